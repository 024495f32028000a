// Gradient by the down-projection of a LoRA linear: dA[r, k] = scale * dxa[m, r]^T (keep * x[m, k]), one read of x.
//
// Layout   dxa, x: T, row-major, rows at 16-byte boundaries; k % 8 == 0; dA: float, row-major
// Plan     Blocks of kColumns of x by all tokens, kTokens a step, are laid end to end and divided among the thread
//          blocks in equal shares, one a multiprocessor. A share's sums of a block of columns go to a workspace, and
//          whoever comes last adds a block's parts in their order: no clusters, which would have to wait for several
//          free multiprocessors side by side, and no second kernel.
//          A step lies in a ring that cp.async fills. A warp takes 32 tokens of it by 64 columns: a lane eight
//          neighbouring columns of the eight tokens that share calls of the mask's generator, four tokens at a time.
//          Two tokens of a column are paired in registers; each lane's column i, of eight, belongs to product i, so
//          that its sums of a row of dA are eight neighbours.
// Source   fragment layout: PTX ISA, mma.m16n8k16 and ldmatrix; equal shares: stream-K (arXiv 2301.03598).
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
  Mask mask;
  Rows rows;
  Plan plan;
  float* parts;        // [slot][kRank][kColumns]
  unsigned* counters;  // of each block of columns: zero, and left so
};

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kXBytes = kTokens * kColumns * 2;
constexpr int kLaneColumns = 8, kWarpColumns = 8 * kLaneColumns;
constexpr int kGroups = kWarps * kWarpColumns / kColumns;  // warps that take different tokens of the same columns
static_assert(kGroups * kMaskRows == kTokens);
constexpr int kSmem = 224 * 1024;

template <int kRank>
struct Config {
  static constexpr int kRankTiles = kRank / 16;
  static constexpr int kFactorPitch = 2 * kRank + 16;  // of rows of dxa: ldmatrix meets no bank twice
  static constexpr int kStageBytes = kXBytes + kTokens * kFactorPitch;
  static constexpr int kStages = kSmem / kStageBytes;
  static constexpr int kSumPitch = kColumns + 4;
  static constexpr int kSumBytes = kGroups * kRank * kSumPitch * 4;  // in the ring's place
  static constexpr int kRingBytes = kStages * kStageBytes;
  static constexpr unsigned kBytes = (kRingBytes > kSumBytes ? kRingBytes : kSumBytes) + 16;
  static_assert(kRank % 16 == 0 && kStages >= 3 && kBytes <= 227 * 1024);
};

// Byte of a tile of x. A quarter of a warp reads every second of eight rows, two pieces of 16 bytes of each.
__device__ inline uint32_t x_at(int token, int sixteen) {
  return static_cast<uint32_t>(token * kColumns * 2 + ((sixteen ^ (token & 6)) * 16));
}

__device__ inline void write_rows(const Problem& p, int row, int column, const float4& v) {
  if (column >= p.k) return;
#pragma unroll
  for (int which = 0; which < kMostAdapters; ++which) {
    if (row >= p.rows.first[which] && row < p.rows.end[which]) {
      *reinterpret_cast<float4*>(p.rows.to[which] + static_cast<int64_t>(row - p.rows.first[which]) * p.k + column) = {
          v.x * p.mask.scale, v.y * p.mask.scale, v.z * p.mask.scale, v.w * p.mask.scale};
    }
  }
}

template <typename T, int kRank, bool kDropout>
__global__ void __launch_bounds__(kThreads, 1) kernel(const __grid_constant__ Problem p) {
  using C = Config<kRank>;
  constexpr int kRankTiles = C::kRankTiles;
  extern __shared__ __align__(1024) uint8_t smem_raw[];
  const uint32_t ring = smem_address(smem_raw), last = ring + C::kBytes - 16;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int warp_column = warp / kGroups * kWarpColumns, group = warp % kGroups;
  const int first_step = static_cast<int>(blockIdx.x) * p.plan.share;
  const int end_step = min(first_step + p.plan.share, p.plan.column_blocks * p.plan.steps);
  wait_for_kernel_before();
  let_next_kernel_start();

  int coming = first_step, end = first_step;  // `end`: of the steps of the block of columns at hand
  const auto fetch = [&](int stage) {
    if (coming < end) {
      const uint32_t to = ring + stage * C::kStageBytes;
      const int block = coming / p.plan.steps, token0 = (coming - block * p.plan.steps) * kTokens;
      const int column = block * kColumns + lane * 8;
#pragma unroll
      for (int i = 0; i < kTokens / kWarps; ++i) {  // a warp copies whole rows
        const int row = i * kWarps + warp;
        const bool present = token0 + row < p.m && column < p.k;
        const T* from = static_cast<const T*>(p.x) + (present ? static_cast<int64_t>(token0 + row) * p.k + column : 0);
        copy_async_16(to + x_at(row, lane), from, present ? 16 : 0);
      }
      for (int at = threadIdx.x; at < kTokens * kRank / 8; at += kThreads) {
        const int row = at / (kRank / 8), rank = at % (kRank / 8) * 8;
        const bool present = token0 + row < p.m && rank < p.r;
        const T* from =
            static_cast<const T*>(p.dxa) + (present ? static_cast<int64_t>(token0 + row) * p.dxa_pitch + rank : 0);
        copy_async_16(to + kXBytes + row * C::kFactorPitch + rank * 2, from, present ? 16 : 0);
      }
      ++coming;
    }
    commit_async();
  };

  for (int step = first_step; step < end_step;) {
    const int block = step / p.plan.steps;
    end = min(end_step, (block + 1) * p.plan.steps);
#pragma unroll 1
    for (int i = 0; i < C::kStages - 1; ++i) fetch(i);

    float acc[kRankTiles][kLaneColumns][4] = {};
    int stage = 0;
    for (; step < end; ++step) {
      wait_async<C::kStages - 2>();
      __syncthreads();  // the tile is complete, and all are done with the stage filled next
      fetch(stage == 0 ? C::kStages - 1 : stage - 1);
      const uint32_t here = ring + stage * C::kStageBytes;
      stage = stage + 1 == C::kStages ? 0 : stage + 1;
      [[maybe_unused]] Philox4 calls[kLaneColumns / kMaskColumns];
      if constexpr (kDropout) {
        const int row_call = ((step - block * p.plan.steps) * kTokens / kMaskRows + group) * kMaskRowCalls + t;
        const int column_call = (block * kColumns + warp_column + g * kLaneColumns) / kMaskColumns;
#pragma unroll
        for (int pair = 0; pair < kLaneColumns / kMaskColumns; ++pair) {
          calls[pair] = philox(static_cast<uint32_t>(column_call + pair), static_cast<uint32_t>(row_call), p.mask.keys);
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int token = group * kMaskRows + half * 16;  // the first of sixteen
        uint32_t x[4][kLaneColumns / 2];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const uint4 v = load_shared(here + x_at(token + 2 * t + i % 2 + i / 2 * 8, warp_column / 8 + g));
          x[i][0] = v.x, x[i][1] = v.y, x[i][2] = v.z, x[i][3] = v.w;
          if constexpr (kDropout) {
#pragma unroll
            for (int pair = 0; pair < kLaneColumns / 2; ++pair) {
              x[i][pair] &= at_least(mask_word(calls[pair], half * 4 + i), p.mask.threshold_twice);
            }
          }
        }
        uint32_t a[kRankTiles][4];
#pragma unroll
        for (int j = 0; j < kRankTiles; ++j) {
          load_matrices<true>(a[j], here + kXBytes + (token + lane / 16 * 8 + lane % 8) * C::kFactorPitch +
                                        (j * 16 + lane / 8 % 2 * 8) * 2);
        }
#pragma unroll
        for (int i = 0; i < kLaneColumns; ++i) {
          const uint32_t pick = i % 2 == 0 ? 0x5410 : 0x7632;
          const uint32_t b0 = permute_bytes(x[0][i / 2], x[1][i / 2], pick);
          const uint32_t b1 = permute_bytes(x[2][i / 2], x[3][i / 2], pick);
#pragma unroll
          for (int j = 0; j < kRankTiles; ++j) mma_m16n8k16<T>(acc[j][i], a[j], b0, b1);
        }
      }
    }

    wait_async<0>();
    __syncthreads();
    // Sums [group][rank][column]: of a row this lane has columns 16t to 16t + 7, and the eight after them.
#pragma unroll
    for (int j = 0; j < kRankTiles; ++j) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
#pragma unroll
        for (int b = 0; b < 2; ++b) {
#pragma unroll
          for (int i = 0; i < kLaneColumns; i += 4) {
            const int column = warp_column + kLaneColumns * (2 * t + b) + i;
            store_shared(ring + ((group * kRank + j * 16 + g + 8 * h) * C::kSumPitch + column) * 4,
                         {__float_as_uint(acc[j][i][2 * h + b]), __float_as_uint(acc[j][i + 1][2 * h + b]),
                          __float_as_uint(acc[j][i + 2][2 * h + b]), __float_as_uint(acc[j][i + 3][2 * h + b])});
          }
        }
      }
    }
    __syncthreads();
    const int first_part = block * p.plan.steps / p.plan.share;
    const int parts = ((block + 1) * p.plan.steps - 1) / p.plan.share - first_part + 1;
    const auto part_at = [&](int part) {
      return p.parts + static_cast<int64_t>(first_part + part + block) * (kRank * kColumns);
    };
    for (int i = threadIdx.x; i < p.r * (kColumns / 4); i += kThreads) {
      const int row = i / (kColumns / 4), column = i % (kColumns / 4) * 4;
      float4 sum{0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
      for (int other = 0; other < kGroups; ++other) {
        const uint4 bits = load_shared(ring + ((other * kRank + row) * C::kSumPitch + column) * 4);
        sum.x += __uint_as_float(bits.x), sum.y += __uint_as_float(bits.y);
        sum.z += __uint_as_float(bits.z), sum.w += __uint_as_float(bits.w);
      }
      if (parts == 1) {
        write_rows(p, row, block * kColumns + column, sum);
      } else {
        __stcg(reinterpret_cast<float4*>(part_at(static_cast<int>(blockIdx.x) - first_part) + row * kColumns + column),
               sum);
      }
    }
    if (parts > 1) {
      __threadfence();
      __syncthreads();
      if (threadIdx.x == 0) {
        store_shared_word(last, atomicInc(p.counters + block, static_cast<unsigned>(parts - 1)));  // wraps to 0
        __threadfence();
      }
      __syncthreads();
      if (load_shared_word(last) == static_cast<uint32_t>(parts - 1)) {
        for (int i = threadIdx.x; i < p.r * (kColumns / 4); i += kThreads) {
          const int row = i / (kColumns / 4), column = i % (kColumns / 4) * 4;
          float4 sum{0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 4
          for (int part = 0; part < parts; ++part) {
            const float4 v = __ldcg(reinterpret_cast<const float4*>(part_at(part) + row * kColumns + column));
            sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
          }
          write_rows(p, row, block * kColumns + column, sum);
        }
      }
    }
    __syncthreads();  // the sums have been read, and the ring may be filled again
  }
}

}  // namespace fastpeft::cuda::lora_da
