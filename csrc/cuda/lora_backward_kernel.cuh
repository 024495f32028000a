// One pass over dy of a LoRA linear: dxa[m, r] = scale dy[m, n] B[n, r] and dB[n, r] = scale dy^T xa[m, r]. For any
// device, and the adding up for all; Hopper's own is lora_backward_tma_kernel.cuh.
//
// Layout   dy, xa, dxa: T, row-major, rows at 16-byte boundaries; B, dB: float, row-major; n % 8 == 0
// Plan     A thread block owns kColumns of dy in a slab of tokens, and goes through them kTokens at a time. The tile
//          lies in shared memory for both products: for dB a warp takes 64 columns and keeps their sums in registers
//          through the slab; for dxa it takes 16 tokens by a quarter of the columns, and four warps' sums meet in
//          shared memory. Sums of a block of columns (dxa) and of a slab (dB) go to a workspace in float, and a
//          second kernel adds them in order, applies the scale and rounds. It also makes the copy of A that the base
//          product wants next.
// Source   fragment layouts: PTX ISA, mma.m16n8k16 and ldmatrix.
#pragma once

#include <cstdint>

#include "cuda/device/hopper.cuh"
#include "cuda/device/numbers.cuh"
#include "cuda/device/ptx.cuh"
#include "cuda/lora_plan.h"

namespace fastpeft::cuda::lora_dy {

struct Problem {
  const void* dy;
  const float* b;
  const void* xa;
  int m, n, r;  // r: of this launch, at most kRank
  int b_pitch, xa_pitch;
  float* dxa_parts;  // [column_blocks / cluster, m, kRank]
  float* db_parts;   // [slabs, n, kRank]
  Plan plan;
};

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kSmem = 226 * 1024;
constexpr int kDyBytes = kTokens * kColumns * 2;

template <int kRank>
struct Config {
  static constexpr int kFactorPitch = 2 * kRank + 16;  // of rows of B and of xa: ldmatrix meets no bank twice
  static constexpr int kBBytes = kColumns * kFactorPitch, kXaBytes = kTokens * kFactorPitch;
  static constexpr int kStageBytes = kDyBytes + kXaBytes;
  static constexpr int kSumBytes = 4 * kTokens * kRank * 4;  // of dxa, by quarters of the columns
  static constexpr int kRoom = (kSmem - kBBytes - kSumBytes) / kStageBytes;
  static constexpr int kStages = kRoom < 6 ? kRoom : 6;
  static constexpr unsigned kBytes = kStages * kStageBytes + kBBytes + kSumBytes;
  static_assert(kStages >= 3);
};

// Byte of a tile of dy: its rows are kColumns wide, and 16-byte chunks change places within 128 bytes.
__device__ inline uint32_t dy_at(int token, int column) {
  return static_cast<uint32_t>(token * kColumns * 2 + ((column / 8) ^ (token % 8)) * 16);
}

template <typename T, int kRank>
__global__ void __launch_bounds__(kThreads, 1) kernel(const __grid_constant__ Problem p) {
  using C = Config<kRank>;
  constexpr int kRankTiles = kRank / 16;
  extern __shared__ __align__(1024) uint8_t smem_raw[];
  const uint32_t ring = smem_address(smem_raw), factor = ring + C::kStages * C::kStageBytes, sums = factor + C::kBBytes;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int low = lane % 8 + lane / 8 % 2 * 8, high = lane / 16 * 8;  // of this lane's row of four matrices
  const int low_upper = lane % 8 + lane / 16 * 8, second = lane / 8 % 2 * 8;
  const int column_block = static_cast<int>(blockIdx.x) % p.plan.column_blocks;
  const int slab = static_cast<int>(blockIdx.x) / p.plan.column_blocks;
  const int first_column = column_block * kColumns, first_token = slab * p.plan.slab_tokens;
  const int steps = (min(p.plan.slab_tokens, p.m - first_token) + kTokens - 1) / kTokens;
  wait_for_kernel_before();
  let_next_kernel_start();

  const auto fetch = [&](int step, int stage) {
    if (step < steps) {
      const uint32_t to = ring + stage * C::kStageBytes;
      const int token0 = first_token + step * kTokens;
#pragma unroll
      for (int i = 0; i < kDyBytes / 16 / kThreads; ++i) {
        const int at = i * kThreads + static_cast<int>(threadIdx.x), row = at / (kColumns / 8),
                  column = at % (kColumns / 8) * 8;
        const bool present = token0 + row < p.m && first_column + column < p.n;
        const T* from = static_cast<const T*>(p.dy) +
                        (present ? static_cast<int64_t>(token0 + row) * p.n + first_column + column : 0);
        copy_async_16(to + dy_at(row, column), from, present ? 16 : 0);
      }
      for (int at = threadIdx.x; at < kTokens * kRank / 8; at += kThreads) {
        const int row = at / (kRank / 8), column = at % (kRank / 8) * 8;
        const bool present = token0 + row < p.m && column < p.r;
        const T* from =
            static_cast<const T*>(p.xa) + (present ? static_cast<int64_t>(token0 + row) * p.xa_pitch + column : 0);
        copy_async_16(to + kDyBytes + row * C::kFactorPitch + column * 2, from, present ? 16 : 0);
      }
    }
    commit_async();
  };
#pragma unroll 1
  for (int i = 0; i < C::kStages - 1; ++i) fetch(i, i);

  // B of these columns, rounded to T.
  for (int i = threadIdx.x; i < kColumns * kRank / 2; i += kThreads) {
    const int row = i / (kRank / 2), column = i % (kRank / 2) * 2;
    const float* from = p.b + static_cast<int64_t>(first_column + row) * p.b_pitch + column;
    const bool inside = first_column + row < p.n;
    const float v0 = inside && column < p.r ? __ldg(from) : 0.0f;
    const float v1 = inside && column + 1 < p.r ? __ldg(from + 1) : 0.0f;
    store_shared_word(factor + row * C::kFactorPitch + column * 2, pack_pair<T>(v0, v1));
  }

  float db[kRankTiles][8][4] = {};
  const int token_half = warp % 2 * 16, quarter = warp / 2;
  int stage = 0;
  for (int step = 0; step < steps; ++step) {
    wait_async<C::kStages - 2>();
    __syncthreads();  // the tile is complete, and all are done with the stage filled next and with the sums
    fetch(step + C::kStages - 1, stage == 0 ? C::kStages - 1 : stage - 1);
    const uint32_t dy = ring + stage * C::kStageBytes, xa = dy + kDyBytes;
    stage = stage + 1 == C::kStages ? 0 : stage + 1;

    // dB^T += xa^T dy: rows of the rank by this warp's 64 columns.
#pragma unroll
    for (int i = 0; i < kTokens / 16; ++i) {
      uint32_t a[kRankTiles][4];
#pragma unroll
      for (int j = 0; j < kRankTiles; ++j) {
        load_matrices<true>(a[j], xa + (i * 16 + low_upper) * C::kFactorPitch + (j * 16 + second) * 2);
      }
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        uint32_t b[4];
        load_matrices<true>(b, dy + dy_at(i * 16 + low, warp * 64 + c * 16 + high));
#pragma unroll
        for (int j = 0; j < kRankTiles; ++j) {
          mma_m16n8k16<T>(db[j][2 * c], a[j], b[0], b[1]);
          mma_m16n8k16<T>(db[j][2 * c + 1], a[j], b[2], b[3]);
        }
      }
    }

    // dxa of 16 tokens by a quarter of the columns.
    float dxa[2 * kRankTiles][4] = {};
#pragma unroll 4
    for (int i = 0; i < kColumns / 4 / 16; ++i) {
      const int column = quarter * (kColumns / 4) + i * 16;
      uint32_t a[4];
      load_matrices<false>(a, dy + dy_at(token_half + low, column + high));
#pragma unroll
      for (int j = 0; j < kRankTiles; ++j) {
        uint32_t b[4];
        load_matrices<true>(b, factor + (column + low) * C::kFactorPitch + (j * 16 + high) * 2);
        mma_m16n8k16<T>(dxa[2 * j], a, b[0], b[1]);
        mma_m16n8k16<T>(dxa[2 * j + 1], a, b[2], b[3]);
      }
    }
#pragma unroll
    for (int j = 0; j < 2 * kRankTiles; ++j) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        store_shared_pair(sums + ((quarter * kTokens + token_half + g + 8 * h) * kRank + 8 * j + 2 * t) * 4,
                          dxa[j][2 * h], dxa[j][2 * h + 1]);
      }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < kTokens * kRank / 2; i += kThreads) {
      const int row = i / (kRank / 2), token = first_token + step * kTokens + row;
      float2 sum{0.0f, 0.0f};
#pragma unroll
      for (int other = 0; other < 4; ++other) {
        const float2 part = load_shared_pair(sums + other * (kTokens * kRank * 4) + i * 8);
        sum.x += part.x, sum.y += part.y;
      }
      if (token < p.m) {
        *reinterpret_cast<float2*>(p.dxa_parts + (static_cast<int64_t>(column_block) * p.m + token) * kRank +
                                   i % (kRank / 2) * 2) = sum;
      }
    }
  }
  wait_async<0>();

#pragma unroll
  for (int j = 0; j < kRankTiles; ++j) {
#pragma unroll
    for (int c = 0; c < 8; ++c) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int column = first_column + warp * 64 + 8 * c + 2 * t + i % 2, rank = j * 16 + g + i / 2 * 8;
        if (column < p.n) p.db_parts[(static_cast<int64_t>(slab) * p.n + column) * kRank + rank] = db[j][c][i];
      }
    }
  }
}

// --- adding up -------------------------------------------------------------------------------------------------------

struct Finish {
  const float* dxa_parts;
  const float* db_parts;
  int64_t m, n;
  int rank, r;               // stored, and of this launch
  int dxa_width;             // columns of dxa, the padded rank of this launch
  int column_blocks, slabs;  // parts of dxa and of dB
  float scale;
  void* dxa;
  int dxa_pitch;
  float* db;
  int db_pitch;
};

constexpr int kFinishThreads = 256;

__device__ inline float4 add_parts(const float* from, int parts, int64_t stride) {
  float4 sum{0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 8
  for (int i = 0; i < parts; ++i) {
    const float4 v = __ldcg(reinterpret_cast<const float4*>(from + i * stride));
    sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
  }
  return sum;
}

template <typename T>
__global__ void __launch_bounds__(kFinishThreads) finish_kernel(const __grid_constant__ Finish f) {
  wait_for_kernel_before();
  let_next_kernel_start();
  int64_t at = blockIdx.x * static_cast<int64_t>(kFinishThreads) + threadIdx.x;
  const int fours = f.rank / 4;
  if (at < f.m * fours) {
    const int64_t token = at / fours;
    const int column = static_cast<int>(at % fours) * 4;
    const float4 v = add_parts(f.dxa_parts + at * 4, f.column_blocks, f.m * f.rank);
    if (column < f.dxa_width) {
      uint2 packed;
      packed.x = pack_pair<T>(v.x * f.scale, v.y * f.scale), packed.y = pack_pair<T>(v.z * f.scale, v.w * f.scale);
      *reinterpret_cast<uint2*>(static_cast<T*>(f.dxa) + token * f.dxa_pitch + column) = packed;
    }
    return;
  }
  at -= f.m * fours;
  if (at < f.n * fours) {
    const int64_t row = at / fours;
    const int column = static_cast<int>(at % fours) * 4;
    const float4 v = add_parts(f.db_parts + at * 4, f.slabs, f.n * f.rank);
    float* to = f.db + row * f.db_pitch + column;
    const float values[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (column + i < f.r) to[i] = values[i] * f.scale;
    }
  }
}

}  // namespace fastpeft::cuda::lora_dy
