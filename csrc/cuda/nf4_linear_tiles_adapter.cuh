// What the tile kernel needs for a low-rank adapter: y += xa[m, r] B^T forward, and, backward, dx += drop(dxa[m, r] A).
//
// Plan     An item that ends the depth takes one more chunk, of the rank instead of the depth: TMA brings xa and the
//          adapter's 16-bit matrix into a stage, 64 of the rank at a time, where the others hold x and decoded weights.
//          It comes last, so that what comes before need not wait for xa.
//          Without dropout its products go straight into the sums. With dropout they are made a few at a time and added
//          where the mask keeps them. The mask's bits are drawn while the tensor cores are at work on
//          the base: a call a step, four lanes sharing each call's four numbers.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "common/philox.h"

namespace fastpeft::cuda::nf4_tiles {

struct NoAdapter {
  static constexpr int r = 0;
};

struct Adapter {
  CUtensorMap xa;      // T [m, r]
  CUtensorMap factor;  // T: forward B times the scale, [n, r]; backward A, [r, k]
  int r;               // of the maps' columns or rows that count
  uint32_t threshold;  // 0: no dropout
  float keep_scale;    // 1 / (1 - p)
  uint64_t seed;
  bool add_to_y;  // y += instead of y =
  bool early;     // the kernel before makes xa and nothing else that is read here, and may still be running
};

// Bits of one thread's share of the mask of a tile of kTokens tokens, in the order of wgmma's accumulators.
//
// Lane 4g + t holds row g (or g + 8) of its warp's 16 and tokens 8j + 2t (+ 1). The four rows g / 4 * 4 (+ 8) of a
// token share a call of the generator: lane g % 4 of the four makes those of the j that are g % 4 modulo 4.
template <int kTokens>
struct MaskBits {
  static constexpr int kCalls = kTokens / 8;  // of a lane
  static constexpr int kWords = kTokens / 64;

  uint64_t first;  // counter of the call of this lane's first token, first row
  uint32_t words[kWords];
  uint32_t drawn;  // nibbles of the calls since the last exchange
  int calls;

  // Starts on a tile: its first token, and the first of the warp's 16 columns of a matrix of `columns` columns.
  __device__ void start(int token, int column, int columns, int lane) {
    const int own = token + 8 * (lane / 4 % 4) + 2 * (lane % 4);
    first =
        static_cast<uint64_t>(own) * static_cast<uint32_t>(columns / 4) + static_cast<uint32_t>(column / 4 + lane / 16);
    calls = 0, drawn = 0;
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = 0;
  }

  // Call 4i + 2b + h: token 32i + b, rows from 8h on.
  __device__ void draw(int columns, uint64_t seed, uint32_t threshold, int lane) {
    const uint64_t counter = first +
                             static_cast<uint64_t>(static_cast<uint32_t>(32 * (calls / 4) + calls / 2 % 2)) *
                                 static_cast<uint32_t>(columns / 4) +
                             static_cast<uint32_t>(calls % 2 * 2);
    const Philox4 random = philox(counter, seed);
    uint32_t nibble = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) nibble |= random.words[i] >= threshold ? 1u << i : 0u;
    drawn |= nibble << (4 * (calls % 8));
    if (++calls % 8 != 0) return;
    uint32_t word = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const uint32_t theirs = __shfl_sync(0xffffffff, drawn, (lane & 19) | (j << 2));
      word |= ((theirs >> (lane / 4 % 4)) & 0x11111111u) << j;
    }
#pragma unroll
    for (int i = 0; i + 1 < kWords; ++i) words[i] = words[i + 1];
    words[kWords - 1] = word;
    drawn = 0;
  }

  // Of accumulator d[i]; i is known when this is compiled.
  __device__ bool keeps(int i) const {
    const int j = i / 4, h = i / 2 % 2, b = i % 2;
    return (words[i / 32] >> (4 * (j / 4 % 2 * 4 + 2 * b + h) + j % 4) & 1) != 0;
  }
};

}  // namespace fastpeft::cuda::nf4_tiles
