// One pass over dy of a LoRA linear on Hopper: dxa[m, r] = scale dy[m, n] B[n, r], dB[n, r] = scale dy^T xa[m, r].
//
// Plan     A thread block owns kColumns of dy in a slab of tokens, kTmaTokens a step. TMA brings tiles of 64 tokens by
//          128 columns into a ring; the last warp to leave one asks for what comes into its place. Three warpgroups
//          multiply, and meet nowhere else: one makes dxa of all the columns, the others dB of every second 128
//          columns, whose sums stay in registers through the slab. wgmma reads a tile of dy as it lies for both:
//          K-major for dxa, MN-major for dB. The blocks of a cluster lie side by side in the columns. Each leaves a
//          step's sums of dxa in its shared memory and goes on with the next step; then each adds a share of the tokens
//          over all of them. What is left, sums of a cluster (dxa) and of a slab (dB), goes to a workspace;
//          lora_backward_kernel.cuh adds it up. Without clusters and by mma.sync, dxa's partial sums were half as large
//          as dy at rank 64, and the factors' fragments, read anew for every 16 tokens, kept shared memory busier than
//          dy did.
// Source   wgmma and its layouts: PTX ISA 9.7.15.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "cuda/device/hopper.cuh"
#include "cuda/device/numbers.cuh"
#include "cuda/device/ptx.cuh"
#include "cuda/lora_backward_kernel.cuh"

namespace fastpeft::cuda::lora_dy {

constexpr int kTmaGroups = 3;  // warpgroups that multiply: the first makes dxa
constexpr int kTmaThreads = 128 * kTmaGroups;
constexpr int kReaders = 8;  // warps that read a tile: those that make dxa, and those that make dB of its columns
constexpr int kStageColumns = 128;
constexpr int kStepStages = kColumns / kStageColumns;
constexpr int kXaSlots = 3;

template <int kRank>
struct TmaConfig {
  static constexpr CUtensorMapSwizzle kXaSwizzle = kRank == 64   ? CU_TENSOR_MAP_SWIZZLE_128B
                                                   : kRank == 32 ? CU_TENSOR_MAP_SWIZZLE_64B
                                                                 : CU_TENSOR_MAP_SWIZZLE_32B;
  static constexpr uint32_t kBoxBytes = kTmaTokens * 64 * 2, kStageBytes = 2 * kBoxBytes;
  static constexpr uint32_t kFactorTile = kRank * 128;  // of B^T: kRank rows of 64 columns
  static constexpr uint32_t kFactorBytes = kColumns / 64 * kFactorTile;
  static constexpr uint32_t kXaBytes = kTmaTokens * kRank * 2;
  static constexpr int kSumPitch = kRank + 8;  // floats: stores of the sums meet no bank twice
  static constexpr uint32_t kSumBytes = kTmaTokens * kSumPitch * 4;
  static constexpr int kRoom = (225 * 1024 - static_cast<int>(kFactorBytes + kXaSlots * kXaBytes + 2 * kSumBytes)) /
                               static_cast<int>(kStageBytes);
  static constexpr int kStages = (kRoom < 10 ? kRoom : 10) / 2 * 2;  // a stage is always of the same warps

  // Offsets in shared memory; tiles lie at multiples of 1024 bytes.
  static constexpr uint32_t factor = kStages * kStageBytes, xa = factor + kFactorBytes, sums = xa + kXaSlots * kXaBytes,
                            full = sums + 2 * kSumBytes, xa_full = full + 8 * kStages, ready = xa_full + 8 * kXaSlots,
                            left = ready + 16, xa_left = left + 4 * kStages, end = xa_left + 4 * kXaSlots;
  static constexpr unsigned kBytes = end + 1024;  // its beginning is moved to a multiple of 1024
  static_assert(kStages >= 5 && kBytes <= 227 * 1024 && kXaBytes % 1024 == 0 && full % 8 == 0);
};

// What a thread block reads of dy and xa, tile by tile.
template <int kRank>
struct Fetch {
  using C = TmaConfig<kRank>;
  const CUtensorMap *map_dy, *map_xa;
  uint32_t smem;
  int first_column, first_token, steps;

  __device__ void dy(int n, int stage) const {
    if (n >= steps * kStepStages) return;
    const uint32_t full = smem + C::full + 8 * stage, to = smem + stage * C::kStageBytes;
    const int column = first_column + n % kStepStages * kStageColumns;
    const int token = first_token + n / kStepStages * kTmaTokens;
    barrier_arrive_expect(full, C::kStageBytes);
    tma_load(to, map_dy, full, column, token);
    tma_load(to + C::kBoxBytes, map_dy, full, column + 64, token);
  }
  __device__ void xa(int step, int slot) const {
    if (step >= steps) return;
    const uint32_t full = smem + C::xa_full + 8 * slot;
    barrier_arrive_expect(full, C::kXaBytes);
    tma_load(smem + C::xa + slot * C::kXaBytes, map_xa, full, 0, first_token + step * kTmaTokens);
  }
  // A warp is done with tile n, and the last of them asks for the next; for one lane.
  __device__ void leave_dy(int n, int stage) const {
    if (leave(smem + C::left + 4 * stage, kReaders - 1) == kReaders - 1) dy(n + C::kStages, stage);
  }
  __device__ void leave_xa(int step, int slot) const {
    if (leave(smem + C::xa_left + 4 * slot, kReaders - 1) == kReaders - 1) xa(step + kXaSlots, slot);
  }
};

// B^T of these columns, rounded to T: tiles as wgmma reads them K-major.
template <typename T, int kRank>
__device__ inline void make_factor(const Problem& p, uint32_t factor, int first_column) {
#pragma unroll 8
  for (int i = threadIdx.x; i < kColumns / 2 * kRank; i += kTmaThreads) {
    const int rank = i % kRank, column = i / kRank * 2;  // and the next
    const float* from = p.b + static_cast<int64_t>(first_column + column) * p.b_pitch + rank;
    const bool inside = rank < p.r && first_column + column < p.n;  // n is even
    const float v0 = inside ? __ldg(from) : 0.0f, v1 = inside ? __ldg(from + p.b_pitch) : 0.0f;
    store_shared_word(factor + column / 64 * TmaConfig<kRank>::kFactorTile + rank * 128 +
                          ((column % 64 / 8 ^ rank % 8) * 16) + column % 8 * 2,
                      pack_pair<T>(v0, v1));
  }
  fence_async_shared();
}

template <typename T, int kRank>
__device__ inline void make_dxa(const Problem& p, const Fetch<kRank>& fetch, int group) {
  using C = TmaConfig<kRank>;
  const uint32_t smem = fetch.smem;
  const int first_token = fetch.first_token, steps = fetch.steps;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int rank = static_cast<int>(cluster_rank()), cluster = static_cast<int>(cluster_size());
  const uint64_t desc_dy = wgmma_descriptor(smem), desc_factor = wgmma_descriptor(smem + C::factor);
  // The sums of a step over the cluster: a share of its tokens.
  const auto add_up = [&](int step) {
    barrier_wait_cluster(smem + C::ready + 8 * (step % 2), step / 2 % 2);
    const int tokens = kTmaTokens / cluster;
    for (int i = threadIdx.x; i < tokens * (kRank / 4); i += 128) {
      const int row = rank * tokens + i / (kRank / 4), column = i % (kRank / 4) * 4;
      const uint32_t at = smem + C::sums + step % 2 * C::kSumBytes + (row * C::kSumPitch + column) * 4;
      float4 sum{0.0f, 0.0f, 0.0f, 0.0f};
      for (int other = 0; other < cluster; ++other) {
        const float4 v = load_cluster_four(shared_of(static_cast<uint32_t>(other), at));
        sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
      }
      const int token = first_token + step * kTmaTokens + row;
      if (token < p.m) {
        __stcg(reinterpret_cast<float4*>(p.dxa_parts + (static_cast<int64_t>(group) * p.m + token) * kRank + column),
               sum);
      }
    }
  };
  int stage = 0, before = 0;
  uint32_t parity = 0;
  for (int step = 0; step < steps; ++step) {
    float d[kRank / 2];
#pragma unroll
    for (int i = 0; i < kStepStages; ++i) {
      barrier_wait(smem + C::full + 8 * stage, parity);
      wgmma_fence();
#pragma unroll
      for (int q = 0; q < kStageColumns / 16; ++q) {
        wgmma<T, false, kRank>(
            d, desc_dy + stage * (C::kStageBytes >> 4) + q / 4 * (C::kBoxBytes >> 4) + q % 4 * kDescriptorStep<false>,
            desc_factor + (2 * i + q / 4) * (C::kFactorTile >> 4) + q % 4 * kDescriptorStep<false>, i > 0 || q > 0);
      }
      wgmma_commit();
      wgmma_wait<1>();
      if (i > 0 && lane == 0) fetch.leave_dy(step * kStepStages + i - 1, before);
      before = stage;
      if (++stage == C::kStages) stage = 0, parity ^= 1;
    }
    wgmma_wait<0>();
    if (lane == 0) fetch.leave_dy(step * kStepStages + kStepStages - 1, before);
#pragma unroll
    for (int i = 0; i < kRank / 2; ++i) asm volatile("" : "+f"(d[i])::"memory");  // no use of a sum before the wait
    // That all have come to the end of the step before says too that this step's place has been read for the last time.
    if (step > 0) add_up(step - 1);
    const uint32_t to =
        smem + C::sums + step % 2 * C::kSumBytes + ((warp * 16 + lane / 4) * C::kSumPitch + lane % 4 * 2) * 4;
#pragma unroll
    for (int j = 0; j < kRank / 8; ++j) {
      store_shared_pair(to + j * 32, d[4 * j], d[4 * j + 1]);
      store_shared_pair(to + j * 32 + 8 * C::kSumPitch * 4, d[4 * j + 2], d[4 * j + 3]);
    }
    __syncwarp();
    if (lane < cluster) {
      barrier_arrive_cluster(shared_of(static_cast<uint32_t>(lane), smem + C::ready + 8 * (step % 2)));
    }
    __syncwarp();
  }
  add_up(steps - 1);
}

// Stages `which` and `which` + 2 of a step.
template <typename T, int kRank>
__device__ inline void make_db(const Problem& p, const Fetch<kRank>& fetch, int which, int slab) {
  using C = TmaConfig<kRank>;
  constexpr int kOwn = kStepStages / 2;
  const uint32_t smem = fetch.smem;
  const int steps = fetch.steps;
  const int lane = threadIdx.x % 32;
  const uint64_t desc_dy = wgmma_descriptor(smem), desc_xa = mn_wgmma_descriptor<2 * kRank>(smem + C::xa);
  float d[kOwn][2][kRank / 2];
  int stage = which, before = 0, slot = 0, slot_before = 0;
  uint32_t parity = 0, slot_parity = 0;
  for (int step = 0; step < steps; ++step) {
    barrier_wait(smem + C::xa_full + 8 * slot, slot_parity);
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      barrier_wait(smem + C::full + 8 * stage, parity);
      wgmma_fence();
#pragma unroll
      for (int q = 0; q < kTmaTokens / 16; ++q) {
#pragma unroll
        for (int box = 0; box < 2; ++box) {
          wgmma<T, true, kRank, true>(
              d[i][box],
              desc_dy + stage * (C::kStageBytes >> 4) + box * (C::kBoxBytes >> 4) + q * kDescriptorStep<true>,
              desc_xa + slot * (C::kXaBytes >> 4) + q * (16 * 2 * kRank >> 4), step > 0 || q > 0);
        }
      }
      wgmma_commit();
      wgmma_wait<1>();
      if (lane == 0 && (step > 0 || i > 0)) {
        fetch.leave_dy(step * kStepStages + which + 2 * i - 2, before);
        if (i == 0) fetch.leave_xa(step - 1, slot_before);
      }
      before = stage;
      stage += 2;
      if (stage >= C::kStages) stage -= C::kStages, parity ^= 1;
    }
    slot_before = slot;
    if (++slot == kXaSlots) slot = 0, slot_parity ^= 1;
  }
  wgmma_wait<0>();
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
#pragma unroll
    for (int box = 0; box < 2; ++box) {
#pragma unroll
      for (int j = 0; j < kRank / 2; ++j) asm volatile("" : "+f"(d[i][box][j])::"memory");
      const int column = fetch.first_column + (which + 2 * i) * kStageColumns + box * 64 +
                         static_cast<int>(threadIdx.x) % 128 / 32 * 16 + lane / 4;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        if (column + 8 * h >= p.n) continue;
        float* to = p.db_parts + (static_cast<int64_t>(slab) * p.n + column + 8 * h) * kRank + lane % 4 * 2;
#pragma unroll
        for (int j = 0; j < kRank / 8; ++j) {
          *reinterpret_cast<float2*>(to + 8 * j) = {d[i][box][4 * j + 2 * h], d[i][box][4 * j + 2 * h + 1]};
        }
      }
    }
  }
}

template <typename T, int kRank>
__global__ void __launch_bounds__(kTmaThreads, 1)
    tma_kernel(const __grid_constant__ CUtensorMap map_dy, const __grid_constant__ CUtensorMap map_xa,
               const __grid_constant__ Problem p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using C = TmaConfig<kRank>;
  extern __shared__ uint8_t smem_raw[];
  const uint32_t smem = (shared_offset(smem_raw) + 1023) & ~1023u;
  const int warpgroup = __shfl_sync(0xffffffff, threadIdx.x / 128, 0);
  const int column_block = static_cast<int>(blockIdx.x) % p.plan.column_blocks;
  const int slab = static_cast<int>(blockIdx.x) / p.plan.column_blocks;
  const int first_column = column_block * kColumns, first_token = slab * p.plan.slab_tokens;
  const int steps = (min(p.plan.slab_tokens, p.m - first_token) + kTmaTokens - 1) / kTmaTokens;
  if (threadIdx.x == 0) {
    tma_prefetch(&map_dy), tma_prefetch(&map_xa);
    for (int s = 0; s < C::kStages; ++s) {
      barrier_init(smem + C::full + 8 * s, 1);
      store_shared_word(smem + C::left + 4 * s, 0);
    }
    for (int s = 0; s < kXaSlots; ++s) {
      barrier_init(smem + C::xa_full + 8 * s, 1);
      store_shared_word(smem + C::xa_left + 4 * s, 0);
    }
    for (int s = 0; s < 2; ++s) barrier_init(smem + C::ready + 8 * s, 4 * cluster_size());
    barrier_init_fence();
  }
  cluster_sync();
  wait_for_kernel_before();
  let_next_kernel_start();
  const Fetch<kRank> fetch{&map_dy, &map_xa, smem, first_column, first_token, steps};
  if (threadIdx.x == 0) {
    for (int s = 0; s < kXaSlots; ++s) fetch.xa(s, s);
    for (int s = 0; s < C::kStages; ++s) fetch.dy(s, s);
  }
  __syncwarp();
  make_factor<T, kRank>(p, smem + C::factor, first_column);
  __syncthreads();
  if (warpgroup == 0) {
    if constexpr (kRank == 64) give_registers<104>();
    make_dxa<T, kRank>(p, fetch, column_block / p.plan.cluster);
  } else {
    if constexpr (kRank == 64) take_registers<200>();
    make_db<T, kRank>(p, fetch, warpgroup - 1, slab);
  }
  __syncwarp();
  cluster_sync();  // a block's sums must outlive the others' reading
#endif
}

}  // namespace fastpeft::cuda::lora_dy
