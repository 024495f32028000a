// Gradient by the down-projection of a LoRA linear: dA[r, k] = scale * dxa[m, r]^T (keep * x[m, k]), one read of x.
//
// Layout   dxa, x: T, row-major, rows at 16-byte boundaries; k % 8 == 0; dA: float, row-major
// Plan     A thread block owns kColumns of x in a slab of tokens, the blocks of a cluster the slabs; they add their
// sums
//          in order through each other's shared memory. A warp takes 16 tokens by 64 columns a step: a lane eight
//          neighbouring columns of four tokens, whose masks are two calls of the generator each, in places of its own
//          of a ring that cp.async fills. Two tokens of a column are paired in registers; each lane's column i, of
//          eight, belongs to product i, so that its sums of a row of dA are eight neighbours.
// Source   fragment layout: PTX ISA, mma.m16n8k16 and ldmatrix.
#pragma once

#include <cstdint>

#include "cuda/device/dropout.cuh"
#include "cuda/device/hopper.cuh"
#include "cuda/device/numbers.cuh"
#include "cuda/device/ptx.cuh"
#include "cuda/lora_plan.h"

namespace fastpeft::cuda::lora_da {

// Rows of dxa's columns, and where they go: the adapters' matrices one below the other, each with its padding.
struct Rows {
  float* to[kMostAdapters];
  int first[kMostAdapters], end[kMostAdapters];  // of this launch's rows
};

struct Problem {
  const void* x;
  const void* dxa;
  int m, k, r;  // r: of this launch, at most kRank
  int dxa_pitch;
  float scale;
  uint32_t threshold;
  uint64_t seed;
  bool beside;
  Rows rows;
  Plan plan;
};

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kXBytes = kTokens * kColumns * 2;

template <int kRank>
struct Config {
  static constexpr int kFactorPitch = 2 * kRank + 16;  // of rows of dxa: ldmatrix meets no bank twice
  static constexpr int kStageBytes = kXBytes + kTokens * kFactorPitch;
  static constexpr int kStages = 112 * 1024 / kStageBytes;
  static constexpr int kSumPitch = kColumns + 4;
  static constexpr int kSumBytes = 2 * kRank * kSumPitch * 4;
  static constexpr int kRingBytes = kStages * kStageBytes;
  static constexpr unsigned kBytes = kRingBytes > kSumBytes ? kRingBytes : kSumBytes;
};

template <typename T, int kRank, bool kDropout>
__global__ void __launch_bounds__(kThreads, kRank > 32 ? 1 : 2) kernel(const __grid_constant__ Problem p) {
  using C = Config<kRank>;
  constexpr int kRankTiles = kRank / 16;
  extern __shared__ __align__(1024) uint8_t smem_raw[];
  const uint32_t ring = smem_address(smem_raw);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int half = warp / 4, warp_column = warp % 4 * 64;
  int rank = 0, cluster = 1;
  if constexpr (kLaunchesOverlap) rank = static_cast<int>(cluster_rank()), cluster = static_cast<int>(cluster_size());
  const int first_column = static_cast<int>(blockIdx.x) / cluster * kColumns + warp_column + 8 * g;
  const int first_token = rank * p.plan.slab_tokens;
  const int steps = max(0, (min(p.plan.slab_tokens, p.m - first_token) + kTokens - 1) / kTokens);
  const int lane_token = half * 16 + 2 * t;  // and the next, and eight further
  if (!p.beside) wait_for_kernel_before();
  let_next_kernel_start();

  const auto fetch = [&](int step, int stage) {
    if (step < steps) {
      const uint32_t to = ring + stage * C::kStageBytes;
      const int token0 = first_token + step * kTokens;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int token = token0 + lane_token + i % 2 + i / 2 * 8;
        const bool present = token < p.m && first_column < p.k;
        const T* from = static_cast<const T*>(p.x) + (present ? static_cast<int64_t>(token) * p.k + first_column : 0);
        copy_async_16(to + warp * 2048 + i * 512 + lane * 16, from, present ? 16 : 0);
      }
      for (int at = threadIdx.x; at < kTokens * kRank / 8; at += kThreads) {
        const int row = at / (kRank / 8), column = at % (kRank / 8) * 8;
        const bool present = token0 + row < p.m && column < p.r;
        const T* from =
            static_cast<const T*>(p.dxa) + (present ? static_cast<int64_t>(token0 + row) * p.dxa_pitch + column : 0);
        copy_async_16(to + kXBytes + row * C::kFactorPitch + column * 2, from, present ? 16 : 0);
      }
    }
    commit_async();
  };
#pragma unroll 1
  for (int i = 0; i < C::kStages - 1; ++i) fetch(i, i);

  float acc[kRankTiles][8][4] = {};
  int stage = 0;
  for (int step = 0; step < steps; ++step) {
    wait_async<C::kStages - 2>();
    __syncthreads();  // dxa is complete, and all are done with the stage filled next
    fetch(step + C::kStages - 1, stage == 0 ? C::kStages - 1 : stage - 1);
    const uint32_t here = ring + stage * C::kStageBytes;
    stage = stage + 1 == C::kStages ? 0 : stage + 1;
    uint4 x[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = load_shared(here + warp * 2048 + i * 512 + lane * 16);
    if constexpr (kDropout) {
      const int token = first_token + step * kTokens + lane_token;
      const uint64_t quad = (static_cast<uint64_t>(token) * static_cast<uint32_t>(p.k) + first_column) / 4;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        drop_eight(x[i], quad + static_cast<uint64_t>(i % 2 + i / 2 * 8) * static_cast<uint32_t>(p.k / 4), p.seed,
                   p.threshold);
      }
    }
    uint32_t a[kRankTiles][4];
#pragma unroll
    for (int j = 0; j < kRankTiles; ++j) {
      load_matrices<true>(a[j], here + kXBytes + (half * 16 + lane / 16 * 8 + lane % 8) * C::kFactorPitch +
                                    (j * 16 + lane / 8 % 2 * 8) * 2);
    }
    const uint32_t words[4][4] = {{x[0].x, x[0].y, x[0].z, x[0].w},
                                  {x[1].x, x[1].y, x[1].z, x[1].w},
                                  {x[2].x, x[2].y, x[2].z, x[2].w},
                                  {x[3].x, x[3].y, x[3].z, x[3].w}};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const uint32_t pick = i % 2 == 0 ? 0x5410 : 0x7632;
      const uint32_t b0 = permute_bytes(words[0][i / 2], words[1][i / 2], pick);
      const uint32_t b1 = permute_bytes(words[2][i / 2], words[3][i / 2], pick);
#pragma unroll
      for (int j = 0; j < kRankTiles; ++j) mma_m16n8k16<T>(acc[j][i], a[j], b0, b1);
    }
  }

  wait_async<0>();
  __syncthreads();
  // Sums [half][rank][column]: of a row this lane has columns 16t to 16t + 7, and the eight after them.
#pragma unroll
  for (int j = 0; j < kRankTiles; ++j) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int b = 0; b < 2; ++b) {
        const uint32_t to =
            ring + ((half * kRank + j * 16 + g + 8 * h) * C::kSumPitch + warp_column + 8 * (2 * t + b)) * 4;
        store_shared(to, {__float_as_uint(acc[j][0][2 * h + b]), __float_as_uint(acc[j][1][2 * h + b]),
                          __float_as_uint(acc[j][2][2 * h + b]), __float_as_uint(acc[j][3][2 * h + b])});
        store_shared(to + 16, {__float_as_uint(acc[j][4][2 * h + b]), __float_as_uint(acc[j][5][2 * h + b]),
                               __float_as_uint(acc[j][6][2 * h + b]), __float_as_uint(acc[j][7][2 * h + b])});
      }
    }
  }
  if constexpr (kLaunchesOverlap) {
    cluster_sync();
  } else {
    __syncthreads();
  }
  const int block_column = static_cast<int>(blockIdx.x) / cluster * kColumns;
  for (int i = rank * kThreads + static_cast<int>(threadIdx.x); i < p.r * (kColumns / 4); i += cluster * kThreads) {
    const int row = i / (kColumns / 4), column = i % (kColumns / 4) * 4;
    float4 sum{0.0f, 0.0f, 0.0f, 0.0f};
    for (int other = 0; other < cluster; ++other) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const uint32_t at = ring + ((h * kRank + row) * C::kSumPitch + column) * 4;
        float4 part;
        if constexpr (kLaunchesOverlap) {
          part = load_cluster_four(shared_of(static_cast<uint32_t>(other), at));
        } else {
          const uint4 bits = load_shared(at);
          part = {__uint_as_float(bits.x), __uint_as_float(bits.y), __uint_as_float(bits.z), __uint_as_float(bits.w)};
        }
        sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
      }
    }
    sum.x *= p.scale, sum.y *= p.scale, sum.z *= p.scale, sum.w *= p.scale;
#pragma unroll
    for (int which = 0; which < kMostAdapters; ++which) {
      if (row >= p.rows.first[which] && row < p.rows.end[which] && block_column + column < p.k) {
        *reinterpret_cast<float4*>(p.rows.to[which] + static_cast<int64_t>(row - p.rows.first[which]) * p.k +
                                   block_column + column) = sum;
      }
    }
  }
  if (p.beside) wait_for_kernel_before();          // so that who waits for this kernel has waited for the one before
  if constexpr (kLaunchesOverlap) cluster_sync();  // nobody leaves with what another still reads
}

}  // namespace fastpeft::cuda::lora_da
