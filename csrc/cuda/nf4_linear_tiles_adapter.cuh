// What the tile kernel needs for a low-rank adapter: y += xa[m, r] B^T forward, and, backward, dx += drop(dxa[m, r] A).
//
// Plan     The rank is taken in pieces of 16, by the warpgroups that multiply and nobody else: each brings a piece of
//          xa into its own half of the tile that stores of y go through, which is free from one item's store to the
//          next, and reads its 64 rows of the adapter's matrix straight into registers, where wgmma takes them. An
//          item that ends the depth asks for a piece, does one more chunk meanwhile and adds the piece's product. The
//          ring of x and decoded weights takes no part: it used to hold the adapter's operands as one more chunk, and
//          ran empty there at the end of every item. Pieces come last, so that what comes before need not wait for
//          xa; where xa is still being made they come behind the item's last chunk. With dropout a piece's products
//          are made a few at a time and added where the mask keeps them. The mask's bits are drawn while the tensor
//          cores are at work on the base: a quarter of a call of the generator every step, half where there are few
//          steps (fastpeft/dropout.h).
#pragma once

#include <cuda.h>

#include <cstdint>

#include "cuda/device/dropout.cuh"
#include "cuda/device/hopper.cuh"
#include "cuda/device/numbers.cuh"
#include "cuda/nf4_linear_tiles_plan.h"

namespace fastpeft::cuda::nf4_tiles {

struct NoAdapter {
  static constexpr int r = 0;
};

struct Adapter {
  CUtensorMap xa;       // T [m, r], in boxes of kPieceRank columns under the 32-byte swizzle
  const float* factor;  // forward B, [out, factor_rank]; backward A, [factor_rank, out]
  int r, factor_rank;   // r: a multiple of 8
  float scale;          // of the factor
  Mask mask;
  bool add_to_y;  // y += instead of y =
  bool early;     // the kernel before makes xa and nothing else that is read here, and may still be running
  // With `early`: of each kReadyTokens tokens, how often the kernel before has written to xa; `writers`: how often it
  // does; null: xa is whole when that kernel has ended. Behind them a counter of thread blocks that are done.
  unsigned* ready;
  unsigned writers;
};

// For one thread that reads xa by TMA. One instruction to the compiler, which else spills registers.
__device__ inline void await_tokens(const Adapter& adapter, int token) {
  asm volatile(
      "{\n.reg .pred p, q;\n.reg .u32 seen;\n"
      "setp.eq.u64 q, %0, 0;\n@q bra there;\n"
      "again:\nld.acquire.gpu.global.u32 seen, [%1];\nsetp.lt.u32 p, seen, %2;\n@p bra again;\n"
      "fence.proxy.async.global;\nthere:\n}\n" ::"l"(adapter.ready),
      "l"(adapter.ready + token / kReadyTokens), "r"(adapter.writers)
      : "memory");
}

// At the end of every thread block: the last of the grid leaves the counters as they were.
__device__ inline void leave_counters(const Adapter& adapter, int m) {
  if (adapter.ready == nullptr || threadIdx.x >= 32) return;
  const int tiles = (m + kReadyTokens - 1) / kReadyTokens;
  unsigned before = 0;
  if (threadIdx.x == 0) before = atomic_increment(adapter.ready + tiles, gridDim.x - 1);
  if (__shfl_sync(0xffffffff, before, 0) != gridDim.x - 1) return;
  for (int tile = static_cast<int>(threadIdx.x); tile < tiles; tile += 32) adapter.ready[tile] = 0;
}

// A warp's 16 rows of a piece of the adapter's matrix, into L1: early, in no register.
template <bool kBackward>
__device__ inline void prefetch_factor(const Adapter& adapter, int out, int first_row, int first_rank, int lane) {
  const int row = first_row + (kBackward ? 0 : lane), rank = first_rank + (kBackward ? lane : 0);
  if (lane < 16 && row < out && rank < adapter.factor_rank) {
    prefetch_l1(adapter.factor + (kBackward ? static_cast<int64_t>(rank) * out + row
                                            : static_cast<int64_t>(row) * adapter.factor_rank + rank));
  }
}

// The same as wgmma's and mma.sync's first operand: of lane 4g + t rows g and g + 8, elements 2t, 2t + 1, 2t + 8 and
// 2t + 9 of the piece.
template <typename T, bool kBackward>
__device__ inline void load_factor(const Adapter& adapter, int out, int first_row, int first_rank, int lane,
                                   uint32_t (&to)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = first_row + lane / 4 + i % 2 * 8, rank = first_rank + lane % 4 * 2 + i / 2 * 8;
    const float* at = adapter.factor + (kBackward ? static_cast<int64_t>(rank) * out + row
                                                  : static_cast<int64_t>(row) * adapter.factor_rank + rank);
    const float low = row < out && rank < adapter.factor_rank ? load_4(at) : 0.0f;
    const float high = row < out && rank + 1 < adapter.factor_rank ? load_4(at + (kBackward ? out : 1)) : 0.0f;
    to[i] = pack_pair<T>(low * adapter.scale, high * adapter.scale);
  }
}

// Bits of one thread's share of the mask of a tile of kTokens tokens.
//
// Lane 4g + t holds rows g and g + 8 of its warp's 16 and tokens 8j + 2t (+ 1). A call serves two neighbouring rows, by
// those tokens of 32: of two such lanes one draws for rows g and g + 1, the other for those eight further, and in the
// end they exchange what is the other's. A word holds two calls' bits, four of every 16 tokens, in either half.
template <int kTokens>
struct MaskBits {
  static constexpr int kCalls = kTokens / kMaskRows;
  static constexpr int kWords = kTokens / 64;
  static constexpr int kQuarters = 4;  // of a call

  uint32_t row_call, column_call;  // of the first call
  Philox4 call;                    // under way
  uint32_t words[kWords];          // the last of them the newest
  int calls;

  // Starts on a tile: its first token, and the first of the warp's 16 columns.
  __device__ void start(int token, int column, int lane) {
    row_call = static_cast<uint32_t>(token / kMaskRows * kMaskRowCalls + lane % 4);
    column_call = static_cast<uint32_t>((column + lane / 8 * 2 + lane / 4 % 2 * 8) / kMaskColumns);
    calls = 0;
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = 0;
  }

  // A quarter of a call, short enough to hide behind a step's multiplication; which one is known when this is compiled.
  __device__ void draw_quarter(int quarter, const Adapter& adapter) {
    if (quarter == 0) {
      asm volatile("" : "+r"(column_call));  // what comes of it at once for all calls would take registers throughout
      call = {{column_call, row_call + static_cast<uint32_t>(kMaskRowCalls * calls), 0, 0}};
    }
#pragma unroll
    for (int round = 0; round < kPhiloxRounds; ++round) {
      if (round / 2 == quarter) philox_round(call, adapter.mask.keys.low[round], adapter.mask.keys.high[round]);
    }
    if (quarter == kQuarters - 1) {
      if (calls % 2 == 0) {
#pragma unroll
        for (int i = 0; i + 1 < kWords; ++i) words[i] = words[i + 1];
      }
      uint32_t& word = words[kWords - 1];
#pragma unroll
      for (int i = 0; i < 8; ++i) {  // a new top bit for either half
        constexpr uint32_t kTops = 0x80008000u;
        word = (word >> 1 & ~kTops) | (kept_halves(mask_word(call, i), adapter.mask.threshold_twice) & kTops);
      }
      if (++calls == kCalls) exchange();
    }
  }
  static_assert(kPhiloxRounds <= 2 * kQuarters);

  // Each keeps its own row of the two it has drawn for, and takes it of the other's: row g in the lower halves.
  __device__ void exchange() {
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const uint32_t other = __shfl_xor_sync(0xffffffff, words[i], 4);
      words[i] = permute_bytes(words[i], other, threadIdx.x & 4 ? 0x3276 : 0x5410);
    }
  }

  // Unrolled: as a loop it has the compiler spill registers.
  __device__ void draw_all(const Adapter& adapter) {
#pragma unroll
    for (int i = 0; i < kCalls; ++i) {
      calls = i;
#pragma unroll
      for (int quarter = 0; quarter < kQuarters; ++quarter) draw_quarter(quarter, adapter);
    }
  }

  // Of accumulator d[i]; i is known when this is compiled. The bit in question alone.
  __device__ uint32_t keeps(int i) const {
    const int j = i / 8, token_half = i / 4 % 2, row_half = i / 2 % 2, odd = i % 2;
    return words[j / 4] & (1u << (j % 4 * 4 + token_half * 2 + odd + 16 * row_half));
  }
};

}  // namespace fastpeft::cuda::nf4_tiles
