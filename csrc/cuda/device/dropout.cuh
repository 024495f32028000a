// Dropout of 16-bit elements in registers.
#pragma once

#include <cstdint>

#include "common/dropout_mask.h"
#include "cuda/device/ptx.cuh"

namespace fastpeft::cuda {

// What tells the calls of a mask: made on the host.
struct Mask {
  uint32_t threshold_twice;  // in both halves; 0: no dropout
  float scale;
  uint64_t seed;
};
inline Mask make_mask(double p, uint64_t seed) {
  return {dropout_threshold(p) * 0x10001u, static_cast<float>(dropout_scale(p)), seed};
}

// Zeroes what the mask drops of 2 kWords columns of four rows, as kWords calls serve them: kWords next to each other
// and those eight further. What stays is not scaled. x[i]: row i % 2 + i / 2 * 8 of the row call's, pairs of columns;
// `swapped`: x[i ^ 1] is.
template <int kWords>
__device__ inline void drop_columns(uint32_t (&x)[4][kWords], uint32_t row_call, uint32_t column_call, const Mask& mask,
                                    bool swapped = false) {
  // Signs of the lower halves, spread over 16 bits each, and of the upper.
  const uint32_t lower = swapped ? 0xFFBB : 0xDD99, upper = swapped ? 0xDD99 : 0xFFBB;
#pragma unroll
  for (int pair = 0; pair < kWords / 2; ++pair) {
    const Philox4 even = philox(column_call + 2 * pair, row_call, mask.seed);
    const Philox4 odd = philox(column_call + 2 * pair + 1, row_call, mask.seed);
#pragma unroll
    for (int word = 0; word < 4; ++word) {
      const uint32_t first = kept_halves(even.words[word], mask.threshold_twice);
      const uint32_t second = kept_halves(odd.words[word], mask.threshold_twice);
      const int half = word / 2, row = word % 2 * 2;
      x[row][half * (kWords / 2) + pair] &= permute_bytes(first, second, lower);
      x[row + 1][half * (kWords / 2) + pair] &= permute_bytes(first, second, upper);
    }
  }
}

}  // namespace fastpeft::cuda
