// Down-projection of a LoRA linear: xa[m, r] = scale * (keep * x[m, k]) A16[r, k]^T, one read of x. For any device;
// Hopper's own is lora_project_tma_kernel.cuh.
//
// Layout   x, A16, xa: T, row-major; k % 8 == 0, r % 8 == 0, rows at 16-byte boundaries
// Plan     A warp owns 32 tokens, a thread block 256; x and A16 go by cp.async into a ring. As tokens and the order of
//          the depth may be dealt out freely, a lane takes of a chunk sixteen neighbouring elements of the four tokens
//          that share calls of the mask's generator: four calls for 64 elements, and four of another lane's.
//          x is asked for before the kernel before has ended: that one copies A16 (lora_cast.cuh) and has itself waited
//          for what made x.
// Source   fragment layout: PTX ISA, mma.m16n8k16.
#pragma once

#include <cstdint>

#include "cuda/device/dropout.cuh"
#include "cuda/device/hopper.cuh"
#include "cuda/device/numbers.cuh"
#include "cuda/device/ptx.cuh"
#include "cuda/lora_plan.h"

namespace fastpeft::cuda::lora_xa {

struct Problem {
  const void* x;
  const void* a;
  void* xa;
  int m, k, r;   // r: of this launch's columns
  int xa_pitch;  // elements
  Mask mask;
  int tiles, chunks;  // chunks of the depth of a thread block
};

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kSmem = 160 * 1024;

template <int kTiles>  // of eight columns
struct Config {
  static constexpr int kRank = 8 * kTiles;
  static constexpr int kXBytes = kTokens * kChunk * 2, kABytes = kRank * kChunk * 2, kStageBytes = kXBytes + kABytes;
  static constexpr int kStages = kSmem / kStageBytes;
  static constexpr unsigned kBytes = kStages * kStageBytes;
  static_assert(kStages >= 3);
};

// Bytes of rows of one chunk, 128 bytes each. A quarter of a warp reads two of the rows, every second 16 bytes.
__device__ inline uint32_t x_at(int token, int sixteen) {
  return static_cast<uint32_t>(token * 128 + ((sixteen ^ (token / 2 % 8)) * 16));
}
__device__ inline uint32_t a_at(int row, int sixteen) {
  return static_cast<uint32_t>(row * 128 + ((sixteen ^ (row % 8)) * 16));
}

// A lane's sixteen elements of a chunk of its four tokens, by its sixteen of A's rows. Product s takes four of them
// from 4s. Rows g and g + 8 of tile i are the lane's tokens x[2i] and x[2i + 1].
template <typename T, int kTiles>
__device__ inline void multiply_chunk(const uint32_t (&x)[4][8], uint32_t a16, float (&acc)[2][kTiles][4]) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
    const uint4 low = load_shared(a16 + a_at(8 * j + g, 2 * t)), high = load_shared(a16 + a_at(8 * j + g, 2 * t + 1));
    const uint32_t b[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
    for (int s = 0; s < 4; ++s) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t a[4] = {x[2 * i][2 * s], x[2 * i + 1][2 * s], x[2 * i][2 * s + 1], x[2 * i + 1][2 * s + 1]};
        mma_m16n8k16<T>(acc[i][j], a, b[2 * s], b[2 * s + 1]);
      }
    }
  }
}

// The ring's chunks in the order in which a thread block takes them.
struct Walk {
  int tile, chunk;
};

template <typename T, int kTiles, bool kDropout>
__global__ void __launch_bounds__(kThreads, 1) kernel(const __grid_constant__ Problem p) {
  using C = Config<kTiles>;
  extern __shared__ __align__(1024) uint8_t smem_raw[];
  const uint32_t ring = smem_address(smem_raw);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int lane_token = warp * 32 + g / 4 * 16 + g % 4 * 2;  // and the next, and those eight further
  const int first_tile = static_cast<int>(blockIdx.x), tile_step = static_cast<int>(gridDim.x);

  const auto advance = [&](Walk& w) {
    if (++w.chunk == p.chunks) w.chunk = 0, w.tile += tile_step;
  };
  const auto fetch_x = [&](const Walk& w, int stage) {
    const uint32_t to = ring + stage * C::kStageBytes;
    const int column = w.chunk * kChunk + static_cast<int>(threadIdx.x) % 8 * 8;
#pragma unroll
    for (int i = 0; i < kTokens * 8 / kThreads; ++i) {
      const int token = i * (kThreads / 8) + static_cast<int>(threadIdx.x) / 8, row = w.tile * kTokens + token;
      const bool present = row < p.m && column < p.k;
      const T* from = static_cast<const T*>(p.x) + (present ? static_cast<int64_t>(row) * p.k + column : 0);
      copy_async_16(to + x_at(token, static_cast<int>(threadIdx.x) % 8), from, present ? 16 : 0);
    }
  };
  const auto fetch_a = [&](const Walk& w, int stage) {
    const uint32_t to = ring + stage * C::kStageBytes + C::kXBytes;
    const int column = w.chunk * kChunk;
#pragma unroll
    for (int i = threadIdx.x; i < C::kRank * 8; i += kThreads) {
      const int row = i / 8, at = column + i % 8 * 8;
      const bool present = row < p.r && at < p.k;
      const T* from = static_cast<const T*>(p.a) + (present ? static_cast<int64_t>(row) * p.k + at : 0);
      copy_async_16(to + a_at(row, i % 8), from, present ? 16 : 0);
    }
  };

  Walk coming{first_tile, 0};
  {
    Walk ahead = coming;
#pragma unroll 1
    for (int i = 0; i < C::kStages - 1 && ahead.tile < p.tiles; ++i, advance(ahead)) fetch_x(ahead, i);
  }
  wait_for_kernel_before();
  let_next_kernel_start();
#pragma unroll 1
  for (int i = 0; i < C::kStages - 1; ++i) {
    if (coming.tile < p.tiles) {
      fetch_a(coming, i);
      advance(coming);
    }
    commit_async();
  }

  int stage = 0;
  for (int tile = first_tile; tile < p.tiles; tile += tile_step) {
    float acc[2][kTiles][4] = {};
    for (int chunk = 0; chunk < p.chunks; ++chunk) {
      wait_async<C::kStages - 2>();
      __syncthreads();  // the chunk is complete, and all are done with the stage filled next
      if (coming.tile < p.tiles) {
        const int to = stage == 0 ? C::kStages - 1 : stage - 1;
        fetch_x(coming, to);
        fetch_a(coming, to);
        advance(coming);
      }
      commit_async();
      const uint32_t here = ring + stage * C::kStageBytes;
      stage = stage + 1 == C::kStages ? 0 : stage + 1;
      uint32_t x[4][8];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint4 v = load_shared(here + x_at(lane_token + i % 2 + i / 2 * 8, 2 * t + half));
          x[i][4 * half] = v.x, x[i][4 * half + 1] = v.y, x[i][4 * half + 2] = v.z, x[i][4 * half + 3] = v.w;
        }
      }
      if constexpr (kDropout) {
        const int row_call = (tile * kTokens + warp * 32) / kMaskRows * kMaskRowCalls + g % 4;
        const int column_call = (chunk * kChunk + 16 * t) / kMaskColumns;
        const SharedDraw<8> draw(static_cast<uint32_t>(row_call), static_cast<uint32_t>(column_call), p.mask);
        draw.drop(x, p.mask);
      }
      multiply_chunk<T, kTiles>(x, here + C::kXBytes, acc);
    }

#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = tile * kTokens + lane_token + i % 2 + i / 2 * 8;
        if (8 * j < p.r && row < p.m) {
          T* to = static_cast<T*>(p.xa) + static_cast<int64_t>(row) * p.xa_pitch + 8 * j + 2 * t;
          *reinterpret_cast<uint32_t*>(to) =
              pack_pair<T>(acc[i / 2][j][i % 2 * 2] * p.mask.scale, acc[i / 2][j][i % 2 * 2 + 1] * p.mask.scale);
        }
      }
    }
  }
  wait_async<0>();
}

}  // namespace fastpeft::cuda::lora_xa
