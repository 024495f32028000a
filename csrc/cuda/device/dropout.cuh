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
  PhiloxKeys keys;
};
inline Mask make_mask(double p, uint64_t seed) {
  return {dropout_threshold(p) * 0x10001u, static_cast<float>(dropout_scale(p)), philox_keys(seed)};
}

// The mask of a lane's share of 32 rows: four rows by kPairs pairs of columns, four neighbouring pairs of eight. Lanes
// below 16 hold row i % 2 + i / 2 * 8 of the row call's as x[i]; the lane 16 above the same of the upper sixteen rows,
// which the same calls serve: each of the two draws half of them and tells the other.
template <int kPairs>
struct SharedDraw {
  Philox4 calls[kPairs / 2];

  // `swapped`: x[i ^ 1] is row i.
  __device__ SharedDraw(uint32_t row_call, uint32_t column_call, const Mask& mask, bool swapped = false) {
#pragma unroll
    for (int two = 0; two < kPairs / 2; ++two) {
      const uint32_t first = column_call + (kPairs == 8 ? 2 : 4) * two;
      const Philox4 call = philox(first + (threadIdx.x & 16 ? 1 : 0), row_call, mask.keys);
#pragma unroll
      for (int i = 0; i < 4; ++i) calls[two].words[i] = swapped ? call.words[i ^ 1] : call.words[i];
    }
  }

  // Zeroes what is dropped. What stays is not scaled.
  __device__ void drop(uint32_t (&x)[4][kPairs], const Mask& mask) const {
    const bool upper = threadIdx.x & 16;
    // Of this lane's word and the other's: the one of the first pair of columns, and of the second, turned if `upper`.
    const uint32_t first = upper ? 0x4765 : 0x3210, second = upper ? 0x0321 : 0x7654;
#pragma unroll
    for (int two = 0; two < kPairs / 2; ++two) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t mine = calls[two].words[i], other = __shfl_xor_sync(0xffffffff, mine, 16);
        x[i][2 * two] &= at_least(permute_bytes(mine, other, first), mask.threshold_twice);
        x[i][2 * two + 1] &= at_least(permute_bytes(mine, other, second), mask.threshold_twice);
      }
    }
  }
};

}  // namespace fastpeft::cuda
