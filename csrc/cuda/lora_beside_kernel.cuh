// Small products of a LoRA linear by a few thread blocks that run beside its base product, on Hopper.
//
// In       forward: xa = x A^T of all adapters that share x, which the product needs at the end of each of its items.
//          Backward, each if there is time for it: dxa = scale dy B, needed likewise, and dB = scale dy^T xa; and
//          dA = dxa^T x of all adapters that share x.
// Plan     8192 tokens by 4096 fill 64 clusters of an H100's 66 exactly eight times, so the thread blocks that are left
//          cost nothing, and four of them read 0.78 TB/s (bench/LOG.md, 2026-11-26). This kernel is launched first and
//          lets the product start at once. They wait for no block of the product, which waits for a counter of every
//          256 tokens, and work ahead of it: its blocks find xa ready, and x in L2.
//          The float32 factor is first rounded to T, by all. Then one thread fetches and the other warpgroups multiply
//          (wgmma, both operands in shared memory, whose 128 bytes a cycle are the limit). Rounding it tile by tile as
//          it streams by was half as fast: two tiles of float32 on their way do not hide their latency.
//          xa       a block's 256 tokens through the whole depth, 128 a warpgroup.
//          dxa, dB  the same walk; two warpgroups sum dxa as they do xa, two more add each chunk's dB to this block's
//                   own sums in L2, which are added up in order at the end: runs are equal to the bit.
//          dA       each block takes columns of x instead, whose sums stay in registers over all tokens.
// Limits   ranks are multiples of 8, 64 in all; no dropout where x is read.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "cuda/device/hopper.cuh"
#include "cuda/device/numbers.cuh"
#include "cuda/device/ptx.cuh"
#include "fastpeft/lora.h"

namespace fastpeft::cuda::lora_beside {

constexpr int kTokens = 256;  // that are ready together
constexpr int kColumns = 64;  // of a tile of x or dy
// Beside the fetching warpgroup, those that multiply: two share the tokens of xa or dxa, and backward two more take
// turns with the chunks of dB. With one for dxa the backward kernel was slower (bench/LOG.md, 2026-11-26).
constexpr int multiplying(bool backward) { return backward ? 4 : 2; }
constexpr int threads(bool backward) { return 128 * (1 + multiplying(backward)); }

struct Problem {
  int m, depth;  // depth: forward k, backward n
  int total;     // the ranks of all adapters: forward what is made, backward columns of dxa
  int r;         // what xa or dxa and dB have; 0: they are not made
  const float* factor[kMostAdapters];
  int first[kMostAdapters];  // rank of each adapter's first
  void* rounded;             // forward [total, k], backward [n, r]
  CUtensorMap map_rounded;
  void* made;  // xa, or this adapter's columns of dxa
  int pitch;   // of its rows
  float scale;
  float* db;           // [n, r]
  float* db_sums;      // of each block but the first, whose sums are in db
  CUtensorMap xa;      // backward: of this adapter
  int k;               // of dA, 0: none
  CUtensorMap x, dxa;  // for it; of all adapters
  float* da[kMostAdapters];
  unsigned* ready;        // of each 256 tokens: how often `made` has been written to
  unsigned* blocks_done;  // twice two counters: how many have come to a meeting, and know that all have
};

template <int kRank>
struct Layout {
  static constexpr uint32_t kTileBytes = kTokens * kColumns * 2, kFactorBytes = kColumns * kRank * 2;
  static constexpr uint32_t kStageBytes = kTileBytes + kFactorBytes, kOperandBytes = kTokens * kRank * 2;
  static constexpr int kStages = kRank == 64 ? 4 : kRank == 32 ? 5 : 6, kOperands = 2;
  // Columns of 64 of a warpgroup, whose sums of dA it holds.
  static constexpr int kOwn = kRank == 64 ? 2 : kRank == 32 ? 4 : 8;

  // Offsets in shared memory. The barriers for dA come first, at the same place for all ranks: the others are never
  // read as such again.
  static constexpr uint32_t x_full = 0, x_empty = x_full + 8 * 6, dxa_full = x_empty + 8 * 6,
                            dxa_empty = dxa_full + 8 * kOperands, full = dxa_empty + 8 * kOperands,
                            empty = full + 8 * kStages, operand_full = empty + 8 * kStages,
                            operand_empty = operand_full + 8 * kOperands, ring = 1024,
                            operand = ring + kStages * kStageBytes, end = operand + kOperands * kOperandBytes;
  static constexpr unsigned kBytes = end + 1024;  // its beginning is moved to a multiple of 1024
  static_assert(kBytes <= 227 * 1024 && operand_empty + 8 * kOperands <= ring && kStageBytes % 1024 == 0);
};

template <typename T, bool kBackward, int kRank>
struct Work {
  using L = Layout<kRank>;
  static constexpr int kGroups = multiplying(kBackward), kThreads = threads(kBackward);
  const Problem& s;
  uint32_t smem;
  int block, blocks, warp, lane;  // warp of the warpgroup

  __device__ int token_blocks() const { return (s.m + kTokens - 1) / kTokens; }
  __device__ int chunks() const { return (s.depth + kColumns - 1) / kColumns; }

  __device__ void init() const {
    if (threadIdx.x == 0) {
      for (int i = 0; i < L::kStages; ++i) {
        barrier_init(smem + L::full + 8 * i, 1);
        barrier_init(smem + L::empty + 8 * i, 4 * kGroups);
      }
      for (int i = 0; i < L::kOperands; ++i) {
        barrier_init(smem + L::operand_full + 8 * i, 1);
        barrier_init(smem + L::operand_empty + 8 * i, 8);
      }
      barrier_init_fence();
    }
  }

  // All of these thread blocks: what each has written before, all see after.
  __device__ void meet(int which) const {
    __syncthreads();
    if (threadIdx.x == 0) {
      unsigned* counters = s.blocks_done + 2 * which;
      const auto all = static_cast<unsigned>(blocks);
      add_release(counters, 1);
      while (load_acquire(counters) < all) {
      }
      if (atomic_increment(counters + 1, all - 1) == all - 1) counters[0] = 0;
      fence_async_global();
    }
    __syncthreads();
  }

  // A block's share of the factor, eight elements at a time.
  __device__ void round_factor() const {
    const int columns = kBackward ? s.r : s.depth;
    const int64_t eights = static_cast<int64_t>(kBackward ? s.depth : s.total) * columns / 8;
    for (int64_t i = block * kThreads + threadIdx.x; i < eights; i += static_cast<int64_t>(blocks) * kThreads) {
      const float* from = s.factor[0];
      int64_t at = i * 8;
      if constexpr (!kBackward) {
        const int row = static_cast<int>(at / columns);
        int first = 0;
#pragma unroll
        for (int which = 1; which < kMostAdapters; ++which) {
          if (row >= s.first[which]) from = s.factor[which], first = s.first[which];
        }
        at -= static_cast<int64_t>(first) * columns;
      }
      const float4 low = __ldg(reinterpret_cast<const float4*>(from + at));
      const float4 high = __ldg(reinterpret_cast<const float4*>(from + at) + 1);
      *reinterpret_cast<uint4*>(static_cast<T*>(s.rounded) + i * 8) = {
          pack_pair<T>(low.x, low.y), pack_pair<T>(low.z, low.w), pack_pair<T>(high.x, high.y),
          pack_pair<T>(high.z, high.w)};
    }
    fence_async_global();
  }

  // Of its own: those of the products before may be of another layout, and stand at any phase.
  __device__ void init_for_da() const {
    if (threadIdx.x == 0) {
      for (int i = 0; i < L::kStages; ++i) {
        barrier_init(smem + L::x_full + 8 * i, 1);
        barrier_init(smem + L::x_empty + 8 * i, 4 * kGroups);
      }
      for (int i = 0; i < 2; ++i) {
        barrier_init(smem + L::dxa_full + 8 * i, 1);
        barrier_init(smem + L::dxa_empty + 8 * i, 4 * kGroups);
      }
      barrier_init_fence();
    }
    __syncthreads();
  }

  // --- the thread that fetches ---
  __device__ void fetch(const CUtensorMap* map) const {
    Ring stage{0, 1}, operand{0, 1};
    for (int tile = block; tile < token_blocks(); tile += blocks) {
      if constexpr (kBackward) {
        const uint32_t full = smem + L::operand_full + 8 * operand.at;
        barrier_wait(smem + L::operand_empty + 8 * operand.at, operand.parity);
        barrier_arrive_expect(full, L::kOperandBytes);
        tma_load(smem + L::operand + operand.at * L::kOperandBytes, &s.xa, full, 0, tile * kTokens);
        operand.advance<L::kOperands>();
      }
      for (int chunk = 0; chunk < chunks(); ++chunk) {
        const uint32_t full = smem + L::full + 8 * stage.at, to = smem + L::ring + stage.at * L::kStageBytes;
        barrier_wait(smem + L::empty + 8 * stage.at, stage.parity);
        barrier_arrive_expect(full, L::kStageBytes);
        tma_load(to, map, full, chunk * kColumns, tile * kTokens);
        kBackward ? tma_load(to + L::kTileBytes, &s.map_rounded, full, 0, chunk * kColumns)
                  : tma_load(to + L::kTileBytes, &s.map_rounded, full, chunk * kColumns, 0);
        stage.advance<L::kStages>();
      }
    }
  }

  // --- the warpgroups that multiply ---
  __device__ void leave(uint32_t barrier) const {
    if (lane == 0) barrier_arrive(barrier);
  }
  // Past a tile of the ring that is another warpgroup's: waited for and left all the same, so that nobody is a turn of
  // the ring ahead of a barrier's phase, or behind.
  __device__ void pass(uint32_t full, uint32_t empty, Ring& stage) const {
    barrier_wait(smem + full + 8 * stage.at, stage.parity);
    leave(smem + empty + 8 * stage.at);
    stage.template advance<L::kStages>();
  }

  // xa or dxa of 128 of each 256 tokens, from `first` on: chunks of the ring times the rounded factor.
  __device__ void make(int first, int group) const {
    constexpr int kParts = 2;
    const uint64_t desc_tile = wgmma_descriptor(smem + L::ring) + (first * 128 >> 4);
    const uint32_t factor = smem + L::ring + L::kTileBytes;
    const uint64_t desc_factor = kBackward ? mn_wgmma_descriptor<2 * kRank>(factor) : wgmma_descriptor(factor);
    constexpr uint32_t kFactorStep = kBackward ? 16 * 2 * kRank >> 4 : kDescriptorStep<false>;
    Ring stage{0, 0};
    float d[kParts][kRank / 2];
    for (int tile = block; tile < token_blocks(); tile += blocks) {
      int stage_before = 0;
      for (int chunk = 0; chunk < chunks(); ++chunk) {
        barrier_wait(smem + L::full + 8 * stage.at, stage.parity);
        wgmma_fence();
#pragma unroll
        for (int q = 0; q < kColumns / 16; ++q) {
#pragma unroll
          for (int part = 0; part < kParts; ++part) {
            wgmma<T, false, kRank, kBackward>(
                d[part],
                desc_tile + stage.at * (L::kStageBytes >> 4) + part * (64 * 128 >> 4) + q * kDescriptorStep<false>,
                desc_factor + stage.at * (L::kStageBytes >> 4) + q * kFactorStep, chunk > 0 || q > 0);
          }
        }
        wgmma_commit();
        wgmma_wait<1>();
        if (chunk > 0) leave(smem + L::empty + 8 * stage_before);
        stage_before = stage.at;
        stage.advance<L::kStages>();
      }
      wgmma_wait<0>();
      leave(smem + L::empty + 8 * stage_before);
      const int width = kBackward ? s.r : s.total;
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
#pragma unroll
        for (int i = 0; i < kRank / 2; ++i) asm volatile("" : "+f"(d[part][i])::"memory");
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int token = tile * kTokens + first + part * 64 + warp * 16 + lane / 4 + 8 * h;
          T* to = static_cast<T*>(s.made) + static_cast<int64_t>(token) * s.pitch + lane % 4 * 2;
#pragma unroll
          for (int j = 0; j < kRank / 8; ++j) {
            if (token < s.m && 8 * j < width) {
              *reinterpret_cast<uint32_t*>(to + 8 * j) =
                  pack_pair<T>(d[part][4 * j + 2 * h] * s.scale, d[part][4 * j + 2 * h + 1] * s.scale);
            }
          }
        }
      }
      fence_async_global();  // the product reads it by TMA
      named_barrier(1 + group, 128);
      if (threadIdx.x % 128 == 0) add_release(s.ready + tile, 1);
    }
  }

  // dB: each chunk of dy, transposed, times xa, added to this block's sums. Every second chunk of those of all tiles.
  __device__ void make_db(int which) const {
    const uint64_t desc_tile = wgmma_descriptor(smem + L::ring);
    const uint64_t desc_xa = mn_wgmma_descriptor<2 * kRank>(smem + L::operand);
    Ring stage{0, 0}, operand{0, 0};
    float* sums = block == 0 ? s.db : s.db_sums + static_cast<int64_t>(block - 1) * s.depth * s.r;
    for (int tile = block; tile < token_blocks(); tile += blocks) {
      barrier_wait(smem + L::operand_full + 8 * operand.at, operand.parity);
      for (int chunk = 0; chunk < chunks(); ++chunk) {
        if (chunk % 2 != which) {
          pass(L::full, L::empty, stage);
          continue;
        }
        float d[kRank / 2];
        barrier_wait(smem + L::full + 8 * stage.at, stage.parity);
        wgmma_fence();
#pragma unroll
        for (int q = 0; q < kTokens / 16; ++q) {
          wgmma<T, true, kRank, true>(d, desc_tile + stage.at * (L::kStageBytes >> 4) + q * kDescriptorStep<true>,
                                      desc_xa + operand.at * (L::kOperandBytes >> 4) + q * (16 * 2 * kRank >> 4),
                                      q > 0);
        }
        wgmma_commit();
        wgmma_wait<0>();
        leave(smem + L::empty + 8 * stage.at);
        stage.advance<L::kStages>();
#pragma unroll
        for (int i = 0; i < kRank / 2; ++i) asm volatile("" : "+f"(d[i])::"memory");
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int column = chunk * kColumns + warp * 16 + lane / 4 + 8 * h;
          float* to = sums + static_cast<int64_t>(column) * s.r + lane % 4 * 2;
#pragma unroll
          for (int j = 0; j < kRank / 8; ++j) {
            if (column < s.depth && 8 * j < s.r) {
              if (tile == block) {
                __stcg(reinterpret_cast<float2*>(to + 8 * j), {d[4 * j + 2 * h], d[4 * j + 2 * h + 1]});
              } else {
                add_pair(to + 8 * j, d[4 * j + 2 * h], d[4 * j + 2 * h + 1]);
              }
            }
          }
        }
      }
      leave(smem + L::operand_empty + 8 * operand.at);
      operand.advance<L::kOperands>();
    }
  }

  // dB of all blocks: a share of it each. By three warps.
  __device__ void add_up_db() const {
    constexpr int kAdding = 96;
    const int64_t fours = static_cast<int64_t>(s.depth) * s.r / 4;
    const int summed = min(blocks, token_blocks());
    for (int64_t i = block * kAdding + warp * 32 + lane; i < fours; i += static_cast<int64_t>(blocks) * kAdding) {
      float4* to = reinterpret_cast<float4*>(s.db) + i;
      float4 sum = __ldcg(to);
#pragma unroll 4
      for (int other = 1; other < summed; ++other) {
        const float4 v = __ldcg(reinterpret_cast<const float4*>(s.db_sums) + (other - 1) * fours + i);
        sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
      }
      *to = {sum.x * s.scale, sum.y * s.scale, sum.z * s.scale, sum.w * s.scale};
    }
  }

  // Columns of x of this block, in 64s, and how many strips of them.
  struct Columns {
    int first, end;
  };
  __device__ Columns columns() const {
    const int all = (s.k + kColumns - 1) / kColumns, each = (all + blocks - 1) / blocks;
    return {min(all, block * each), min(all, (block + 1) * each)};
  }
  static constexpr int kStrip = kGroups * L::kOwn;

  __device__ uint32_t dxa_at(int slot) const { return smem + L::operand + slot * L::kOperandBytes; }

  __device__ void fetch_for_da() const {
    Ring stage{0, 1}, operand{0, 1};
    const Columns mine = columns();
    for (int strip = mine.first; strip < mine.end; strip += kStrip) {
      const int end = min(mine.end, strip + kStrip);
      for (int tile = 0; tile < token_blocks(); ++tile) {
        const uint32_t dxa_full = smem + L::dxa_full + 8 * operand.at;
        barrier_wait(smem + L::dxa_empty + 8 * operand.at, operand.parity);
        barrier_arrive_expect(dxa_full, L::kOperandBytes);
        tma_load(dxa_at(operand.at), &s.dxa, dxa_full, 0, tile * kTokens);
        operand.advance<2>();
        for (int chunk = strip; chunk < end; ++chunk) {
          const uint32_t full = smem + L::x_full + 8 * stage.at;
          barrier_wait(smem + L::x_empty + 8 * stage.at, stage.parity);
          barrier_arrive_expect(full, L::kTileBytes);
          tma_load(smem + L::ring + stage.at * L::kStageBytes, &s.x, full, chunk * kColumns, tile * kTokens);
          stage.advance<L::kStages>();
        }
      }
    }
  }

  // dA: warpgroups take turns with the chunks of a strip.
  __device__ void make_da(int group) const {
    const uint64_t desc_tile = wgmma_descriptor(smem + L::ring);
    Ring stage{0, 0}, operand{0, 0};
    const Columns mine = columns();
    for (int strip = mine.first; strip < mine.end; strip += kStrip) {
      const int end = min(mine.end, strip + kStrip);
      float d[L::kOwn][kRank / 2];
      for (int tile = 0; tile < token_blocks(); ++tile) {
        const uint64_t desc_dxa = mn_wgmma_descriptor<2 * kRank>(dxa_at(operand.at));
        barrier_wait(smem + L::dxa_full + 8 * operand.at, operand.parity);
#pragma unroll
        for (int own = 0; own < L::kOwn; ++own) {
          int chunk = strip + kGroups * own;
          if (chunk >= end) break;
          for (int others = group; others > 0; --others, ++chunk) {
            if (chunk < end) pass(L::x_full, L::x_empty, stage);
          }
          // Of chunks that there are not, what lies in the ring is multiplied and forgotten: a branch around wgmma
          // costs copies of all sums.
          if (chunk < end) barrier_wait(smem + L::x_full + 8 * stage.at, stage.parity);
          wgmma_fence();
#pragma unroll
          for (int q = 0; q < kTokens / 16; ++q) {
            wgmma<T, true, kRank, true>(d[own],
                                        desc_tile + stage.at * (L::kStageBytes >> 4) + q * kDescriptorStep<true>,
                                        desc_dxa + q * (16 * 2 * kRank >> 4), tile > 0 || q > 0);
          }
          wgmma_commit();
          wgmma_wait<0>();
          if (chunk < end) {
            leave(smem + L::x_empty + 8 * stage.at);
            stage.advance<L::kStages>();
          }
          for (++chunk; chunk < min(end, strip + kGroups * (own + 1)); ++chunk) pass(L::x_full, L::x_empty, stage);
        }
        leave(smem + L::dxa_empty + 8 * operand.at);
        operand.advance<2>();
      }
#pragma unroll
      for (int own = 0; own < L::kOwn; ++own) {
#pragma unroll
        for (int i = 0; i < kRank / 2; ++i) asm volatile("" : "+f"(d[own][i])::"memory");
        const int chunk = strip + kGroups * own + group;
#pragma unroll
        for (int j = 0; j < kRank / 8; ++j) {
          if (8 * j >= s.total || chunk >= end) continue;
          int row = 8 * j + lane % 4 * 2;
          float* to = s.da[0];
#pragma unroll
          for (int which = 1; which < kMostAdapters; ++which) {
            if (8 * j >= s.first[which]) to = s.da[which], row = 8 * j + lane % 4 * 2 - s.first[which];
          }
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int column = chunk * kColumns + warp * 16 + lane / 4 + 8 * (i / 2);
            if (column < s.k) to[static_cast<int64_t>(row + i % 2) * s.k + column] = d[own][4 * j + i];
          }
        }
      }
    }
  }
};

// kGradientRank: what the ranks of all adapters that share x are filled up to; kRank: those of what is made first.
template <typename T, bool kBackward, int kRank, int kGradientRank>
__global__ void __launch_bounds__(threads(kBackward), 1)
    kernel(const __grid_constant__ CUtensorMap map, const __grid_constant__ Problem p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ uint8_t smem_raw[];
  const uint32_t smem = (shared_offset(smem_raw) + 1023) & ~1023u;
  const int block = static_cast<int>(blockIdx.x), blocks = static_cast<int>(gridDim.x);
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = __shfl_sync(0xffffffff, threadIdx.x / 32 % 4, 0);
  const int group = __shfl_sync(0xffffffff, threadIdx.x / 128, 0) - 1;  // that multiplies
  wait_for_kernel_before();
  let_next_kernel_start();
  const Work<T, kBackward, kRank> work{p, smem, block, blocks, warp, lane};
  const Work<T, kBackward, kGradientRank> gradient{p, smem, block, blocks, warp, lane};
  work.init();
  if (p.r > 0) {
    work.round_factor();
    work.meet(0);
    if (group < 0) {
      if (warp == 3 && lane == 0) work.fetch(&map);
      __syncwarp();
    } else if (group < 2) {
      work.make(128 * group, group);
    } else if constexpr (kBackward) {
      work.make_db(group - 2);
    }
    if constexpr (kBackward) work.meet(1);
  }
  if constexpr (kBackward) {
    gradient.init_for_da();
    if (group >= 0) {
      gradient.make_da(group);
    } else if (warp < 3) {
      if (p.r > 0) work.add_up_db();
    } else if (lane == 0) {
      gradient.fetch_for_da();
    }
  }
#endif
}

}  // namespace fastpeft::cuda::lora_beside
