// What the tile kernel needs for a low-rank adapter: y += xa[m, r] B^T forward, and, backward, dx += drop(dxa[m, r] A).
//
// Plan     An item that ends the depth takes one more chunk, of the rank instead of the depth: TMA brings xa and the
//          adapter's 16-bit matrix into a stage, 64 of the rank at a time, where the others hold x and decoded weights.
//          It comes last, so that what comes before need not wait for xa.
//          Without dropout its products go straight into the sums, behind the loop over the depth: a condition inside
//          that loop makes the compiler end wgmma's groups there, and the wait for the step before becomes one for all.
//          With dropout they are made a few at a time and added where the mask keeps them. The mask's bits are drawn
//          while the tensor cores are at work on the base: a call of the generator every second step, whose eight
//          elements are eight of the thread's own sums (fastpeft/dropout.h).
#pragma once

#include <cuda.h>

#include <cstdint>

#include "cuda/device/dropout.cuh"

namespace fastpeft::cuda::nf4_tiles {

struct NoAdapter {
  static constexpr int r = 0;
};

struct Adapter {
  CUtensorMap xa;      // T [m, r]
  CUtensorMap factor;  // T: forward B times the scale, [n, r]; backward A, [r, k]
  int r;               // of the maps' columns or rows that count
  Mask mask;
  bool add_to_y;  // y += instead of y =
  bool early;     // the kernel before makes xa and nothing else that is read here, and may still be running
};

// Bits of one thread's share of the mask of a tile of kTokens tokens.
//
// Lane 4g + t holds rows g and g + 8 of its warp's 16 and tokens 8j + 2t (+ 1): of every 16 tokens the eight elements
// of one call. A word holds four calls' bits, those of the even tokens in its lower half.
template <int kTokens>
struct MaskBits {
  static constexpr int kCalls = kTokens / kMaskBlock;
  static constexpr int kWords = kTokens / 64;

  uint32_t row_call, column_call;  // of the next call
  uint32_t words[kWords];          // the last of them the newest
  int calls;

  // Starts on a tile: its first token, and the first of the warp's 16 columns.
  __device__ void start(int token, int column, int lane) {
    row_call = static_cast<uint32_t>(token / kMaskBlock * kMaskRowCalls + lane % 4);
    column_call = static_cast<uint32_t>(column / kMaskBlock * kMaskColumnCalls + lane / 4);
    calls = 0;
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = 0;
  }

  __device__ void draw(const Mask& mask) {
    if (calls % 4 == 0) {
#pragma unroll
      for (int i = 0; i + 1 < kWords; ++i) words[i] = words[i + 1];
    }
    const Philox4 random = philox(column_call, row_call, mask.seed);
    uint32_t& word = words[kWords - 1];
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // a new top bit for either half
      constexpr uint32_t kTops = 0x80008000u;
      word = (word >> 1 & ~kTops) | (kept_halves(random.words[i], mask.threshold_twice) & kTops);
    }
    row_call += kMaskRowCalls, ++calls;
  }

  // Of accumulator d[i]; i is known when this is compiled. The bit in question alone.
  __device__ uint32_t keeps(int i) const {
    const int j = i / 8, token_half = i / 4 % 2, row_half = i / 2 % 2, odd = i % 2;
    return words[j / 4] & (1u << (j % 4 * 4 + row_half * 2 + token_half + 16 * odd));
  }
};

}  // namespace fastpeft::cuda::nf4_tiles
