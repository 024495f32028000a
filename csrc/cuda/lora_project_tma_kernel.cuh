// Down-projection of a LoRA linear on Hopper: xa[m, r] = scale * (keep * x[m, k]) A16[r, k]^T, one read of x.
//
// Plan     The lanes' shares are those of lora_project_kernel.cuh. TMA fills the ring. A chunk of it belongs to one of
//          two sets of eight warps, which take turns; the last warp of a set to leave a chunk asks for what comes into
//          its place. So nothing ever waits for the whole thread block, and while one warp draws its mask others
//          multiply. By cp.async, with all warps at the same chunk, it read 1.9 TB/s, and half of that with dropout.
//          The blocks of a cluster divide the depth, and add their sums in order through each other's shared memory.
//          x is asked for before the kernel before has ended: that one copies A16 (lora_cast.cuh) and has itself waited
//          for what made x.
#pragma once

#include <cuda.h>

#include <cstdint>
#include <type_traits>

#include "cuda/device/dropout.cuh"
#include "cuda/device/hopper.cuh"
#include "cuda/device/numbers.cuh"
#include "cuda/device/ptx.cuh"
#include "cuda/lora_project_kernel.cuh"

namespace fastpeft::cuda::lora_xa {

template <int kTiles>
struct TmaConfig {
  static constexpr int kSets = 2;
  static constexpr int kPasses = kTiles > 4 ? 2 : 1;  // by half of a lane's elements of a chunk, for want of registers
  static constexpr int kTmaThreads = kSets * kThreads;
  static constexpr int kRank = 8 * kTiles;
  static constexpr uint32_t kXBytes = kTokens * kChunk * 2, kABytes = kRank * kChunk * 2,
                            kStageBytes = kXBytes + kABytes;
  static constexpr int kSumTiles = kTiles < 4 ? kTiles : 4;  // whose sums meet at once
  static constexpr int kSumPitch = 8 * kSumTiles + 4;        // of the sums [token][column], in floats
  static constexpr uint32_t kSumBytes = kTokens * kSumPitch * 4;
  // A stage is always of the same set: else a warp might be a whole turn of the ring ahead of a barrier's phase.
  static constexpr int kStages = static_cast<int>((225 * 1024 - kSumBytes) / kStageBytes) / kSets * kSets;
  static constexpr uint32_t sums = kStages * kStageBytes, full = sums + kSumBytes, left = full + 8 * kStages,
                            end = left + 4 * kStages;
  static constexpr unsigned kBytes = end + 1024;  // its beginning is moved to a multiple of 1024
  static_assert(kStages >= 4 && kStageBytes % 1024 == 0 && kBytes <= 227 * 1024);
};

// A lane's place: made anew where it is needed, for want of registers.
struct Lane {
  int warp_token, g, t;

  __device__ Lane() {
    uint32_t thread;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    warp_token = static_cast<int>(thread % kThreads / 32 * 32), g = static_cast<int>(thread % 32 / 4);
    t = static_cast<int>(thread % 4);
  }
  // Of x[i]. Lanes with odd g take neighbouring tokens the other way round: so a quarter of a warp reads an even and an
  // odd row of TMA's swizzle, and no bank twice.
  __device__ int token(int i) const { return warp_token + g / 4 * 16 + g % 4 * 2 + (i % 2 ^ g % 2) + i / 2 * 8; }
};

// As multiply_chunk, of two times four elements of a lane: those at `a16` and eight further.
template <typename T, int kTiles>
__device__ inline void multiply_half(const uint32_t (&x)[4][4], uint32_t a16, int g, int t,
                                     float (&acc)[2][kTiles][4]) {
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      const uint2 b = load_shared_8(a16 + a_at(8 * j + g, 2 * t + s));
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t a[4] = {x[2 * i][2 * s], x[2 * i + 1][2 * s], x[2 * i][2 * s + 1], x[2 * i + 1][2 * s + 1]};
        mma_m16n8k16<T>(acc[i][j], a, b.x, b.y);
      }
    }
  }
}

struct NoDraw {
  __device__ NoDraw(uint32_t, uint32_t, const Mask&, bool = false) {}
};

template <int kPairs, bool kDropout>
using Draw = std::conditional_t<kDropout, SharedDraw<kPairs>, NoDraw>;

template <typename T, int kTiles, bool kDropout>
__global__ void __launch_bounds__(TmaConfig<kTiles>::kTmaThreads, 1)
    tma_kernel(const __grid_constant__ CUtensorMap map_x, const __grid_constant__ CUtensorMap map_a,
               const __grid_constant__ Problem p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using C = TmaConfig<kTiles>;
  extern __shared__ uint8_t smem_raw[];
  const uint32_t smem = (shared_offset(smem_raw) + 1023) & ~1023u;
  const int rank = static_cast<int>(cluster_rank()), cluster = static_cast<int>(cluster_size());
  const int first_chunk = rank * p.chunks;
  const int chunks = max(0, min(p.chunks, (p.k + kChunk - 1) / kChunk - first_chunk));
  const int first_tile = static_cast<int>(blockIdx.x) / cluster, tile_step = static_cast<int>(gridDim.x) / cluster;
  if (threadIdx.x == 0) {
    tma_prefetch(&map_x), tma_prefetch(&map_a);
    for (int s = 0; s < C::kStages; ++s) {
      barrier_init(smem + C::full + 8 * s, 1);
      store_shared_word(smem + C::left + 4 * s, 0);
    }
    barrier_init_fence();
  }
  __syncthreads();

  const int total = chunks * ((p.tiles - first_tile + tile_step - 1) / tile_step);
  const auto fetch_x = [&](int n) {
    const int stage = n % C::kStages;
    barrier_arrive_expect(smem + C::full + 8 * stage, C::kStageBytes);
    tma_load(smem + stage * C::kStageBytes, &map_x, smem + C::full + 8 * stage, (first_chunk + n % chunks) * kChunk,
             (first_tile + n / chunks * tile_step) * kTokens);
  };
  const auto fetch_a = [&](int n) {
    const int stage = n % C::kStages;
    tma_load(smem + stage * C::kStageBytes + C::kXBytes, &map_a, smem + C::full + 8 * stage,
             (first_chunk + n % chunks) * kChunk, 0);
  };
  if (threadIdx.x == 0) {
    const int ahead = min(total, C::kStages);
    for (int n = 0; n < ahead; ++n) fetch_x(n);
    wait_for_kernel_before();
    let_next_kernel_start();
    for (int n = 0; n < ahead; ++n) fetch_a(n);
  }
  __syncwarp();

  const int set = static_cast<int>(threadIdx.x) / kThreads;
  int before = 0;  // chunks of the tiles before
  for (int tile = first_tile; tile < p.tiles; tile += tile_step, before += chunks) {
    float acc[2][kTiles][4] = {};
    for (int chunk = (before + set) % C::kSets; chunk < chunks; chunk += C::kSets) {
      const int n = before + chunk, stage = n % C::kStages;
      const uint32_t here = smem + stage * C::kStageBytes;
      const Lane l;
      // Where x[0] lies. Its neighbour lies elsewhere in bits 4 and 7, the other half of either in bit 4.
      const uint32_t first = here + a_at(l.token(0), 2 * l.t);
      const auto row_call =
          static_cast<uint32_t>((tile * kTokens + l.warp_token) / kMaskRows * kMaskRowCalls + l.g % 4);
      const auto column_call = static_cast<uint32_t>(((first_chunk + chunk) * kChunk + 16 * l.t) / kMaskColumns);
      if constexpr (C::kPasses == 1) {
        const Draw<8, kDropout> draw(row_call, column_call, p.mask, l.g % 2 != 0);
        barrier_wait(smem + C::full + 8 * stage, n / C::kStages % 2);
        uint32_t x[4][8];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const uint32_t at = (first ^ (i % 2 * 144)) + i / 2 * 1024;
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const uint4 v = load_shared(half == 0 ? at : at ^ 16);
            x[i][4 * half] = v.x, x[i][4 * half + 1] = v.y, x[i][4 * half + 2] = v.z, x[i][4 * half + 3] = v.w;
          }
        }
        if constexpr (kDropout) draw.drop(x, p.mask);
        multiply_chunk<T, kTiles>(x, here + C::kXBytes, acc);
      } else {
        // Every second four columns. Which come first depends on t, so that half a warp meets no bank twice.
        barrier_wait(smem + C::full + 8 * stage, n / C::kStages % 2);
#pragma unroll 1
        for (int pass = 0; pass < C::kPasses; ++pass) {
          const int which = (pass ^ l.t ^ l.t / 2) % 2;
          const Draw<4, kDropout> draw(row_call, column_call + 2 * which, p.mask, l.g % 2 != 0);
          uint32_t x[4][4];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const uint32_t at = (first ^ (i % 2 * 144)) + i / 2 * 1024 + which * 8;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              const uint2 v = load_shared_8(half == 0 ? at : at ^ 16);
              x[i][2 * half] = v.x, x[i][2 * half + 1] = v.y;
            }
          }
          if constexpr (kDropout) draw.drop(x, p.mask);
          multiply_half<T, kTiles>(x, here + C::kXBytes + which * 8, l.g, l.t, acc);
        }
      }
      __syncwarp();
      if (l.g + l.t == 0 && leave(smem + C::left + 4 * stage, kWarps - 1) == kWarps - 1 && n + C::kStages < total) {
        fetch_x(n + C::kStages), fetch_a(n + C::kStages);
      }
    }

    const Lane l;
    // The sets' sums, one on the other's, and then those of the cluster's blocks.
#pragma unroll
    for (int first = 0; first < kTiles; first += C::kSumTiles) {
#pragma unroll 1
      for (int turn = 0; turn < C::kSets; ++turn) {
        if (turn == set) {
#pragma unroll
          for (int j = first; j < min(kTiles, first + C::kSumTiles); ++j) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              const uint32_t to = smem + C::sums + (l.token(i) * C::kSumPitch + 8 * (j - first) + 2 * l.t) * 4;
              float2 sum{acc[i / 2][j][i % 2 * 2], acc[i / 2][j][i % 2 * 2 + 1]};
              if (turn > 0) {
                const float2 other = load_shared_pair(to);
                sum.x += other.x, sum.y += other.y;
              }
              store_shared_pair(to, sum.x, sum.y);
            }
          }
        }
        named_barrier(1, C::kTmaThreads);
      }
      if (cluster > 1) cluster_sync();
      const int rows = kTokens / cluster, pairs = min(p.r / 2 - 4 * first, 4 * C::kSumTiles);
      for (int i = static_cast<int>(threadIdx.x); i < rows * pairs; i += C::kTmaThreads) {
        const int token = rank * rows + i / pairs, pair = i % pairs;
        float2 sum{0.0f, 0.0f};
        for (int other = 0; other < cluster; ++other) {
          const float2 part = load_cluster_pair(
              shared_of(static_cast<uint32_t>(other), smem + C::sums + (token * C::kSumPitch + 2 * pair) * 4));
          sum.x += part.x, sum.y += part.y;
        }
        if (tile * kTokens + token < p.m) {
          T* to =
              static_cast<T*>(p.xa) + static_cast<int64_t>(tile * kTokens + token) * p.xa_pitch + 8 * first + 2 * pair;
          *reinterpret_cast<uint32_t*>(to) = pack_pair<T>(sum.x * p.mask.scale, sum.y * p.mask.scale);
        }
      }
      // Nobody overwrites, or leaves with, what another still reads.
      if (cluster > 1) {
        cluster_sync();
      } else {
        named_barrier(1, C::kTmaThreads);
      }
    }
  }
#endif
}

}  // namespace fastpeft::cuda::lora_xa
