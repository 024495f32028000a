// Down-projection of a LoRA linear: xa[m, r] = scale * (keep * x[m, k]) A16[r, k]^T, one read of x.
//
// Layout   x, A16, xa: T, row-major; k % 8 == 0, r % 8 == 0, rows at 16-byte boundaries
// Plan     A warp owns 16 tokens, a thread block 128; the blocks of a cluster divide the depth and add their sums in
//          order through each other's shared memory. x goes by cp.async into a deep ring in which every lane has places
//          of its own: it reads back what it wrote itself. As the order of the depth within a product is free, a lane's
//          eight neighbouring elements are its share of two of them, and two calls of the generator are their mask.
//          A16 goes through the same ring, for all warps.
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
  float scale;
  uint32_t threshold;
  uint64_t seed;
  int tiles, chunks;  // chunks of the depth of a thread block
};

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kSmem = 226 * 1024;

template <int kTiles>  // of eight columns
struct Config {
  static constexpr int kRank = 8 * kTiles;
  static constexpr int kXBytes = kTokens * kChunk * 2, kABytes = kRank * kChunk * 2, kStageBytes = kXBytes + kABytes;
  static constexpr int kSumPitch = kRank + 4;  // of the sums [token][column], in floats
  static constexpr int kSumBytes = kTokens * kSumPitch * 4;
  static constexpr int kStages = (kSmem - kSumBytes) / kStageBytes < 12 ? (kSmem - kSumBytes) / kStageBytes : 12;
  static constexpr unsigned kBytes = kStages * kStageBytes + kSumBytes;
  static_assert(kStages >= 3);
};

// The ring's chunks in the order in which a thread block takes them.
struct Walk {
  int tile, chunk;
};

template <typename T, int kTiles, bool kDropout>
__global__ void __launch_bounds__(kThreads, 1) kernel(const __grid_constant__ Problem p) {
  using C = Config<kTiles>;
  extern __shared__ __align__(1024) uint8_t smem_raw[];
  const uint32_t ring = smem_address(smem_raw), sums = ring + C::kStages * C::kStageBytes;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  int rank = 0, cluster = 1;
  if constexpr (kLaunchesOverlap) rank = static_cast<int>(cluster_rank()), cluster = static_cast<int>(cluster_size());
  const int first_chunk = rank * p.chunks;
  const int chunks = max(0, min(p.chunks, (p.k + kChunk - 1) / kChunk - first_chunk));
  const int first_tile = static_cast<int>(blockIdx.x) / cluster, tile_step = static_cast<int>(gridDim.x) / cluster;
  wait_for_kernel_before();
  let_next_kernel_start();

  Walk coming{first_tile, 0};
  const auto fetch = [&](int stage) {
    if (chunks > 0 && coming.tile < p.tiles) {
      const uint32_t to = ring + stage * C::kStageBytes;
      const int column = (first_chunk + coming.chunk) * kChunk;
#pragma unroll
      for (int i = 0; i < 4; ++i) {  // row g or g + 8, first or second half of the chunk
        const int row = coming.tile * kTokens + warp * 16 + g + i % 2 * 8, at = column + i / 2 * 32 + t * 8;
        const bool present = row < p.m && at < p.k;
        const T* from = static_cast<const T*>(p.x) + (present ? static_cast<int64_t>(row) * p.k + at : 0);
        copy_async_16(to + warp * 2048 + i * 512 + lane * 16, from, present ? 16 : 0);
      }
#pragma unroll
      for (int i = threadIdx.x; i < C::kRank * 8; i += kThreads) {
        const int row = i / 8, at = column + i % 8 * 8;
        const bool present = row < p.r && at < p.k;
        const T* from = static_cast<const T*>(p.a) + (present ? static_cast<int64_t>(row) * p.k + at : 0);
        copy_async_16(to + C::kXBytes + row * 128 + ((i % 8) ^ (row % 2 * 4)) * 16, from, present ? 16 : 0);
      }
      if (++coming.chunk == chunks) coming.chunk = 0, coming.tile += tile_step;
    }
    commit_async();
  };
#pragma unroll 1
  for (int i = 0; i < C::kStages - 1; ++i) fetch(i);

  int stage = 0;
  for (int tile = first_tile; tile < p.tiles; tile += tile_step) {
    const int row = tile * kTokens + warp * 16 + g;
    float acc[kTiles][4] = {};
    for (int chunk = 0; chunk < chunks; ++chunk) {
      wait_async<C::kStages - 2>();
      __syncthreads();  // A16 of this chunk is complete, and all are done with the stage filled next
      fetch(stage == 0 ? C::kStages - 1 : stage - 1);
      const uint32_t here = ring + stage * C::kStageBytes;
      stage = stage + 1 == C::kStages ? 0 : stage + 1;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint4 low = load_shared(here + warp * 2048 + half * 1024 + lane * 16);
        uint4 high = load_shared(here + warp * 2048 + half * 1024 + 512 + lane * 16);
        if constexpr (kDropout) {
          const int column = (first_chunk + chunk) * kChunk + half * 32 + t * 8;
          const uint64_t quad = (static_cast<uint64_t>(row) * static_cast<uint32_t>(p.k) + column) / 4;
          drop_eight(low, quad, p.seed, p.threshold);
          drop_eight(high, quad + 2 * static_cast<uint64_t>(p.k), p.seed, p.threshold);
        }
        const uint32_t first[4] = {low.x, high.x, low.y, high.y}, second[4] = {low.z, high.z, low.w, high.w};
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
          const uint4 a = load_shared(here + C::kXBytes + (8 * j + g) * 128 + ((half * 4 + t) ^ (g % 2 * 4)) * 16);
          mma_m16n8k16<T>(acc[j], first, a.x, a.y);
          mma_m16n8k16<T>(acc[j], second, a.z, a.w);
        }
      }
    }

    if (cluster == 1) {
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          if (8 * j < p.r && row + 8 * h < p.m) {
            T* to = static_cast<T*>(p.xa) + static_cast<int64_t>(row + 8 * h) * p.xa_pitch + 8 * j + 2 * t;
            *reinterpret_cast<uint32_t*>(to) = pack_pair<T>(acc[j][2 * h] * p.scale, acc[j][2 * h + 1] * p.scale);
          }
        }
      }
      continue;
    }
    if constexpr (kLaunchesOverlap) {
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          store_shared_pair(sums + ((warp * 16 + g + 8 * h) * C::kSumPitch + 8 * j + 2 * t) * 4, acc[j][2 * h],
                            acc[j][2 * h + 1]);
        }
      }
      cluster_sync();
      const int rows = kTokens / cluster, pairs = p.r / 2;
      for (int i = threadIdx.x; i < rows * pairs; i += kThreads) {
        const int token = rank * rows + i / pairs, pair = i % pairs;
        float2 sum{0.0f, 0.0f};
        for (int other = 0; other < cluster; ++other) {
          const float2 part =
              load_cluster_pair(shared_of(static_cast<uint32_t>(other), sums + (token * C::kSumPitch + 2 * pair) * 4));
          sum.x += part.x, sum.y += part.y;
        }
        if (tile * kTokens + token < p.m) {
          T* to = static_cast<T*>(p.xa) + static_cast<int64_t>(tile * kTokens + token) * p.xa_pitch + 2 * pair;
          *reinterpret_cast<uint32_t*>(to) = pack_pair<T>(sum.x * p.scale, sum.y * p.scale);
        }
      }
      cluster_sync();  // nobody overwrites, or leaves with, what another still reads
    }
  }
  wait_async<0>();
}

}  // namespace fastpeft::cuda::lora_xa
