// NF4 product for more than a few tokens on Hopper: y[m, out] = x[m, depth] @ op(W)^T (+ bias), W read as codes.
//
// Layout   x   T [m, depth], y T [m, out], row-major; x 16-byte aligned, rows too
//          W   uint8 [n, k / 2], high nibble = even k; k % 64 == 0, blocks of 64 or more. Forward out = n, depth = k;
//              backward out = k, depth = n, by reading the same decoded rows as an MN-major operand: nothing is
//              transposed.
// Plan     A persistent grid, a thread block an SM, its items from nf4_linear_tiles_plan.h. TMA brings x and the codes.
//          One to four warpgroups decode: a lane takes 64 weights of a row, that share a scale, looks them up in its
//          registers and stores them as 128 bytes of a swizzled tile, which costs shared memory no more than TMA of
//          16-bit weights would. Two warpgroups multiply, 64 of out each (wgmma, both operands in shared memory).
//          Two thread blocks with neighbouring tokens form a cluster: each decodes every second step and copies the
//          tile to the other, so that decoding stays below the time of multiplying, and costs half the energy.
//          Decoding in the registers of the multiplying warps, and decoding once into a ring in L2, were slower
//          (bench/LOG.md, 2026-11-25 and 2026-11-26).
//          An adapter's low-rank product joins the sums: nf4_linear_tiles_adapter.cuh. Tokens sorted by expert, each
//          expert with a weight of its own: nf4_linear_tiles_experts.cuh.
//          256 tokens take 128 accumulators a thread and leave registers for one decoding warpgroup; 128 tokens have
//          two and fewer have four, which take turns, since then decoding limits.
// Numerics level times scale in float32, rounded once to T (as nf4_dequantize); sums in float32; one rounding to T.
//          Shared units are summed in a tree of their parts, whoever comes last: runs are equal to the bit.
// Source   wgmma and its layouts: PTX ISA 9.7.15; division of the depth: stream-K (arXiv 2301.03598).
#pragma once

#include <cuda.h>

#include "cuda/device/hopper.cuh"
#include "cuda/device/numbers.cuh"
#include "cuda/device/ptx.cuh"
#include "cuda/nf4_linear_tiles_adapter.cuh"
#include "cuda/nf4_linear_tiles_decode.cuh"
#include "cuda/nf4_linear_tiles_plan.h"

namespace fastpeft::cuda::nf4_tiles {

// --- multiplying -----------------------------------------------------------------------------------------------------

// Makes d the sum of a shared unit's parts in the warpgroup that comes last; false in the others. Parts are added as a
// binary tree in the order of the depth: of the two that meet at a node, the second adds the first's sum to its own,
// and as a + b = b + a the bits do not depend on who is second. Nobody waits but for what is being written already, so
// that the grid need not be resident as a whole.
template <typename C>
__device__ bool add_parts(const Problem& p, const Item& item, float (&d)[C::kTokens / 2], uint32_t smem, int group,
                          int rank) {
  constexpr int kTokens = C::kTokens;
  const int thread = threadIdx.x % 128, first_slot = item.last_slot - (item.parts - 1);
  const auto partial = [&](int part) {  // in the order of the accumulators
    return reinterpret_cast<float4*>(p.workspace + ((first_slot + part) * C::kCluster + rank) * partial_bytes(kTokens) +
                                     group * (partial_bytes(kTokens) / 2)) +
           thread;
  };
  const uint32_t word = smem + C::last + 4 * group;
  int lowest = item.part;  // of the parts in d
  for (int width = 1; width < item.parts; width *= 2) {
    const int other = lowest ^ width;
    if (other >= item.parts) continue;
    // How many have come to the node, whose place is that of its right child's lowest part, and how many have written.
    const int node = first_slot + (lowest | width);
    unsigned* counters = p.counters + ((node * C::kCluster + rank) * kConsumers + group) * kCountersEach;
    if (thread == 0) store_shared_word(word, atomic_increment(counters, 1));
    named_barrier(1 + group, 128);
    if (load_shared_word(word) == 0) {
      float4* mine = partial(lowest);
#pragma unroll
      for (int i = 0; i < kTokens / 8; ++i) {
        __stcg(mine + i * 128, make_float4(d[4 * i], d[4 * i + 1], d[4 * i + 2], d[4 * i + 3]));
      }
      named_barrier(1 + group, 128);
      if (thread == 0) add_release(counters + 1, 1);
      return false;
    }
    if (thread == 0) {
      while (load_acquire(counters + 1) == 0) {
      }
      counters[1] = 0;
    }
    named_barrier(1 + group, 128);
    const float4* from = partial(other);
#pragma unroll
    for (int i = 0; i < kTokens / 8; ++i) {
      const float4 v = __ldcg(from + i * 128);
      d[4 * i] += v.x, d[4 * i + 1] += v.y, d[4 * i + 2] += v.z, d[4 * i + 3] += v.w;
      if (i % 8 == 7) __syncwarp();  // as many loads in flight as there are registers for
    }
    lowest &= other;
  }
  return true;
}

// `end`: of the tokens that are stored.
template <typename T, typename C>
__device__ void store(const CUtensorMap* map_y, const Problem& p, int out0, int tile_m0, int end,
                      float (&d)[C::kTokens / 2], uint32_t smem, int group, bool add = false) {
  constexpr int kTokens = C::kTokens;
  const int thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32;
  out0 += group * 64;
  if (p.bias != nullptr) {
    const int row = out0 + warp * 16 + lane / 4;
    const T* bias = static_cast<const T*>(p.bias);
    const float low = row < p.plan.out ? to_float(bias[row]) : 0.0f;
    const float high = row + 8 < p.plan.out ? to_float(bias[row + 8]) : 0.0f;
#pragma unroll
    for (int i = 0; i < kTokens / 8; ++i)
      d[4 * i] += low, d[4 * i + 1] += low, d[4 * i + 2] += high, d[4 * i + 3] += high;
  }
  // 64 of out by kStoreTokens at a time. Two tiles of half the size, in turns, were slower: twice the barriers.
  const uint32_t tile = smem + C::staging + group * C::kStagingBytes;
#pragma unroll
  for (int part = 0; part < kTokens / C::kStoreTokens; ++part) {
    if (thread == 0) tma_wait_read<0>();
    named_barrier(1 + group, 128);
#pragma unroll
    for (int j = 0; j < C::kStoreTokens / 16; ++j) {
      const float* v = d + (part * C::kStoreTokens + 16 * j) / 2;
      store_matrices_transposed(tile + swizzled(j * 16 + lane / 16 * 8 + lane % 8, (2 * warp + lane / 8 % 2) * 16),
                                pack_pair<T>(v[0], v[1]), pack_pair<T>(v[2], v[3]), pack_pair<T>(v[4], v[5]),
                                pack_pair<T>(v[6], v[7]));
    }
    fence_async_shared();
    named_barrier(1 + group, 128);
    const int m0 = tile_m0 + part * C::kStoreTokens;
    if (C::kExperts && m0 + C::kStoreTokens > end) {  // the tokens behind are another expert's
      for (int i = thread; i < C::kStoreTokens * 8; i += 128) {
        const int token = m0 + i / 8, o = out0 + i % 8 * 8;
        store_16_if(token < end && o < p.plan.out,
                    static_cast<uint16_t*>(p.y) + static_cast<int64_t>(token) * p.plan.out + o,
                    load_shared(tile + swizzled(i / 8, i % 8 * 16)));
      }
    } else if (p.store_by_tma) {
      if (thread == 0) {
        if (out0 < p.plan.out && m0 < end) {
          if (add) {
            tma_add(map_y, tile, out0, m0);
          } else {
            tma_store(map_y, tile, out0, m0);
          }
        }
        tma_commit();
      }
    } else {
      for (int i = thread; i < C::kStoreTokens * 64; i += 128) {
        const int token = m0 + i / 64, o = out0 + i % 64;
        unsigned short bits;
        asm volatile("ld.shared.b16 %0, [%1];" : "=h"(bits) : "r"(tile + swizzled(i / 64, i % 64 * 2)));
        if (token < end && o < p.plan.out) {
          static_cast<unsigned short*>(p.y)[static_cast<int64_t>(token) * p.plan.out + o] = bits;
        }
      }
    }
  }
}

// d += keep * (factor xa^T) / (1 - p), kPieceRank of the rank. By mma.sync, whose operand and sums lie as wgmma's do: a
// second place for wgmma's sums would have the compiler serialise them all.
template <typename T, typename C>
__device__ inline void multiply_masked(const uint32_t (&factor)[4], uint32_t xa, const MaskBits<C::kTokens>& mask,
                                       float keep_scale, float (&d)[C::kTokens / 2]) {
  const int lane = threadIdx.x % 32;
  const int row = lane / 16 * 8 + lane % 8;  // this lane's of four matrices: 16 tokens by 16 of the rank
  const uint32_t from = xa + row * (2 * kPieceRank) + ((lane / 8 % 2 ^ row / 4 % 2) << 4);
#pragma unroll
  for (int j = 0; j < C::kTokens / 16; j += 2) {
    uint32_t b[2][4];
    load_matrices<false>(b[0], from + j * (16 * 2 * kPieceRank));
    load_matrices<false>(b[1], from + (j + 1) * (16 * 2 * kPieceRank));
    float e[4][4] = {};
#pragma unroll
    for (int i = 0; i < 4; ++i) mma_m16n8k16<T>(e[i], factor, b[i / 2][i % 2 * 2], b[i / 2][i % 2 * 2 + 1]);
#pragma unroll
    for (int i = 0; i < 16; ++i) add_if(mask.keeps(8 * j + i), d[8 * j + i], e[i / 4][i % 4], keep_scale);
    __syncwarp();  // as much in flight as there are registers for
  }
}

template <typename T, bool kBackward, typename C>
__device__ void multiply(const CUtensorMap* map_y, const typename C::AdapterOrNone& adapter, const Problem& p,
                         uint32_t smem, int group, int rank) {
  constexpr int kTokens = C::kTokens;
  if constexpr (!C::kAdapter) wait_for_kernel_before();
  const int lane = threadIdx.x % 32;
  const uint64_t desc_x = wgmma_descriptor(smem + C::x);
  const uint64_t desc_w = wgmma_descriptor(smem + C::w + group * (C::kWBytes / 2));
  float d[kTokens / 2];
  const auto release = [&](int stage) {
    const uint32_t empty = smem + C::empty + 8 * stage;
    if (lane == 0) barrier_arrive(empty);
    if constexpr (C::kCluster > 1) {  // also where this stage is decoded
      if (lane == 1 && stage % 2 != rank) barrier_arrive_remote(shared_of(rank ^ 1, empty));
    }
  };
  Ring stage{0, 0};
  Item item;
  [[maybe_unused]] const uint32_t xa = smem + C::staging + group * C::kStagingBytes,
                                  xa_full = smem + C::xa_full + 8 * group;
  [[maybe_unused]] uint32_t xa_parity = 0;
  [[maybe_unused]] bool xa_made = true;
  [[maybe_unused]] MaskBits<kTokens> mask;
  if constexpr (C::kAdapter && !kBackward) xa_made = !adapter.early || adapter.ready != nullptr;
  for (int index = 0; find_item(items_of<C>(p), blockIdx.x / C::kCluster, index, item); ++index) {
    int before = 0, chunk = 0, pieces = 0;  // pieces: of the adapter's rank, where the item ends the depth
    [[maybe_unused]] bool all_behind = false, hurried = false;
    [[maybe_unused]] const auto row0 = [&] {  // of this warp; made anew each time, for want of registers
      uint32_t thread;
      asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
      return item.out0 + group * 64 + static_cast<int>(thread) / 32 % 4 * 16;
    };
    if constexpr (C::kAdapter) {
      if (item.first_chunk + item.chunks == p.plan.chunks) pieces = ceil_divide(adapter.r, kPieceRank);
      all_behind = pieces > 0 && !xa_made;
      if constexpr (kBackward) {
        mask.start(item.m0 + rank * kTokens, row0(), lane);
        if (pieces == 0 || adapter.mask.threshold_twice == 0) mask.calls = mask.kCalls;
        // A chunk draws a call, or two where it must; where even that is too few before the first piece's product, all
        // are drawn here.
        const int undisturbed = max(1, item.chunks - pieces + 1);
        hurried = undisturbed < mask.kCalls;
        if ((2 * undisturbed < mask.kCalls || !C::kDrawsMeanwhile) && mask.calls == 0) mask.draw_all(adapter);
      }
    }
    // The chunks without a piece; and for each piece, while it is on its way, a chunk.
    for (int piece = -1; piece < pieces; ++piece) {
      // A piece is asked for behind the first step of its chunk, when nobody reads the one before any more.
      [[maybe_unused]] bool asked = piece < 0;
      [[maybe_unused]] const auto ask = [&] {
        if constexpr (C::kAdapter) {
          asked = true;
          if (!xa_made) wait_for_kernel_before(), xa_made = true;
          named_barrier(1 + group, 128);  // nobody reads what the tile for xa holds
          if (threadIdx.x % 128 == 0) {
            tma_wait_read<0>();
            if constexpr (C::kCluster > 1) {  // only these plans have blocks beside them
              if (piece == 0) await_tokens(adapter, min(item.m0 + rank * kTokens, p.plan.m - 1));
            }
            barrier_arrive_expect(xa_full, kTokens * kPieceRank * 2);
            tma_load(xa, &adapter.xa, xa_full, piece * kPieceRank, item.m0 + rank * kTokens);
          }
          prefetch_factor<kBackward>(adapter, p.plan.out, row0(), piece * kPieceRank, lane);
        }
      };
      const int until = all_behind ? item.chunks : max(1, item.chunks - pieces + piece + 1);
      for (; chunk < until; ++chunk) {
#pragma unroll
        for (int i = 0; i < kChunkSteps; ++i) {
          const int at = C::kStages == kChunkSteps ? i : stage.at;  // a constant where it can be
          barrier_wait(smem + C::full + 8 * at, stage.parity);
          const uint64_t x = desc_x + at * (C::kXBytes >> 4), w = desc_w + at * (C::kWBytes >> 4);
          if constexpr (C::kReaderFences) fence_async_shared();
          wgmma_fence();
#pragma unroll
          for (int q = 0; q < kStep / 16; ++q) {
            wgmma<T, kBackward, kTokens>(d, w + kDescriptorStep<kBackward> * q, x + kDescriptorStep<false> * q,
                                         q > 0 || i > 0 || chunk > 0);
          }
          wgmma_commit();
          wgmma_wait<1>();
          if (i > 0 || chunk > 0) release(C::kStages == kChunkSteps ? (i + kChunkSteps - 1) % kChunkSteps : before);
          before = at;
          if constexpr (C::kAdapter) {
            if (i == 0 && !asked) ask();
          }
          if constexpr (C::kAdapter && kBackward && C::kDrawsMeanwhile) {
            if (mask.calls < mask.kCalls) {
              if (hurried) {
                mask.draw_quarter(i % 2 * 2, adapter), mask.draw_quarter(i % 2 * 2 + 1, adapter);
              } else {
                mask.draw_quarter(i, adapter);
              }
            }
          }
          if (C::kStages != kChunkSteps) stage.advance<C::kStages>();
        }
        if (C::kStages == kChunkSteps) stage.parity ^= 1;
      }
      if constexpr (C::kAdapter) {
        if (piece >= 0) {
          if (!asked) wgmma_wait<0>(), ask();
          uint32_t factor[4];
          load_factor<T, kBackward>(adapter, p.plan.out, row0(), piece * kPieceRank, lane, factor);
          const bool masked = kBackward && adapter.mask.threshold_twice != 0;
          barrier_wait(xa_full, xa_parity);
          xa_parity ^= 1;
          if (!masked) {
            wgmma_fence();
            wgmma_registers<T, kTokens>(d, factor, narrow_wgmma_descriptor(xa), true);
            wgmma_commit();
          }
          if constexpr (kBackward) {
            if (masked) {
              wgmma_wait<0>();
#pragma unroll
              for (int i = 0; i < kTokens / 2; ++i) asm volatile("" : "+f"(d[i])::"memory");
              multiply_masked<T, C>(factor, xa, mask, adapter.mask.scale, d);
            }
          }
        }
      }
    }
    wgmma_wait<0>();
    release(C::kStages == kChunkSteps ? kChunkSteps - 1 : before);
#pragma unroll
    for (int i = 0; i < kTokens / 2; ++i) asm volatile("" : "+f"(d[i])::"memory");  // no use of a sum before the wait
    if (item.parts > 1 && !add_parts<C>(p, item, d, smem, group, rank)) continue;
    bool add = false;
    if constexpr (C::kAdapter) add = adapter.add_to_y;
    const int end = C::kExperts ? item.m_end : p.plan.m;
    store<T, C>(map_y, p, item.out0, item.m0 + rank * kTokens, end, d, smem, group, add);
  }
  if (threadIdx.x % 128 == 0) tma_wait();
}

// --- kernel ----------------------------------------------------------------------------------------------------------

template <typename T, bool kBackward, int kTokens, int kCluster, bool kAdapter, bool kExperts>
__global__ void __launch_bounds__(Config<kTokens, kCluster>::kThreads, 1)
    kernel(const __grid_constant__ CUtensorMap map_x, const __grid_constant__ CUtensorMap map_w,
           const __grid_constant__ CUtensorMap map_y,
           const __grid_constant__ typename Config<kTokens, kCluster, kAdapter>::AdapterOrNone adapter,
           const __grid_constant__ Problem p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using C = Config<kTokens, kCluster, kAdapter, kExperts>;
  extern __shared__ uint8_t smem_raw[];
  const uint32_t smem = (shared_offset(smem_raw) + 1023) & ~1023u;
  float* map = reinterpret_cast<float*>(smem_raw + (smem - shared_offset(smem_raw)) + C::map);
  const int rank = kCluster == 1 ? 0 : static_cast<int>(cluster_rank());
  if (threadIdx.x == 0) {
    tma_prefetch(&map_x);
    tma_prefetch(&map_w);
    if (p.store_by_tma) tma_prefetch(&map_y);
    if constexpr (kAdapter) tma_prefetch(&adapter.xa);
    for (int s = 0; s < C::kStages; ++s) {
      const bool mine = s % kCluster == rank;
      // The fetch of x and what the other copies; this block's decoding warps.
      barrier_init(smem + C::full + 8 * s, mine ? 1 + 4 : 1);
      barrier_init(smem + C::empty + 8 * s, 4 * kConsumers * (mine ? kCluster : 1));
    }
    for (int s = 0; s < C::kDecoders * C::kCodeChunks; ++s) {
      barrier_init(smem + C::codes_full + 8 * s, 1);
      barrier_init(smem + C::codes_empty + 8 * s, 4);
    }
    for (int s = 0; s < kConsumers; ++s) barrier_init(smem + C::xa_full + 8 * s, 1);
    barrier_init_fence();
  }
  bool early = false;
  if constexpr (kAdapter) {
    early = adapter.early;
    if (!early) wait_for_kernel_before();
    let_next_kernel_start();
  } else {
    if constexpr (kExperts) wait_for_kernel_before();  // it wrote what there is to do
    let_next_kernel_start();                           // those wait who touch more than the weight (device/ptx.cuh)
  }
  if (p.w.nested_absmax != nullptr && threadIdx.x < 256) map[threadIdx.x] = __ldg(p.w.nested_map + threadIdx.x);
  __syncthreads();
  if constexpr (kCluster > 1) cluster_sync();

  const int warpgroup = __shfl_sync(0xffffffff, threadIdx.x / 128, 0);
  if (warpgroup < C::kDecoders) {
    // Registers change hands within the 3 x 168 that the block starts with.
    if constexpr (kTokens == 256) give_registers<104>();
    decode<T, kBackward, C>(&map_x, &map_w, p, smem, map, warpgroup, rank);
  } else if (warpgroup == C::kDecoders + kConsumers) {
    if (threadIdx.x % 32 == 0) fetch<kBackward, C>(&map_x, &map_w, p, smem, rank);
  } else {
    if constexpr (kTokens == 256) take_registers<200>();
    multiply<T, kBackward, C>(&map_y, adapter, p, smem, warpgroup - C::kDecoders, rank);
  }
  if (early) wait_for_kernel_before();  // so that who waits for this kernel has waited for the one before
  if constexpr (kCluster > 1) {         // a block's shared memory must outlive the other's last arrival and copy
    __syncwarp();
    cluster_sync();
  }
  if constexpr (kAdapter && kCluster > 1) leave_counters(adapter, p.plan.m);
#endif
}

}  // namespace fastpeft::cuda::nf4_tiles
