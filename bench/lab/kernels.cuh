// NF4 product for many tokens on Hopper: y[m, out] = x[m, depth] @ op(w)^T, with w decoded once, inside the kernel,
// ahead of its use.
//
// Layout   x      bf16 [m, depth]; y bf16 [m, out]
//          w      uint8 [n, k / 2], high nibble = even k, scales nested as bitsandbytes stores them. Forward: out = n,
//                 depth = k; backward: out = k, depth = n (dx = dy @ w), by reading the same decoded rows as an
//                 MN-major operand: no transposition anywhere
//          ring   bf16 blocks of 128 x 256 in the caller's workspace, each four tiles in the swizzled order shared
//                 memory wants (plan.h)
// Plan     a persistent grid, one thread block per SM. Warp 0: one thread fetches x (TMA) and w (one bulk copy of 16 KB
//          a step). Warps 1 to 3 decode, all thread blocks' together, the blocks in the order in which the tiles need
//          them. Decoding needs registers only (PRMT, no table in shared memory, whose bandwidth the wgmmas use up) and
//          rounds once: level x scale in fp32, then bf16. Warps 4 to 11, two warpgroups: wgmma m64n256k16, both
//          operands in shared memory, 128 x 256 outputs a tile. A warpgroup more for the decoding does not compile: at
//          512 threads the entry has 128 registers a thread, and ptxas (13.0) refuses an m64n256 there, setmaxnreg or
//          not (C7602, it wants 154).
//          kRing = false is the same loop over a bf16 w: the yardstick, and the product of the two-launch variant.
// Limits   k % 64 == 0, n % 8 == 0 (TMA's row pitch); all thread blocks must be resident at once (cooperative launch).
//
// Handing a block over, through global memory:
//          decoder   st.global; every lane fence.proxy.async; __syncwarp; lane 0 red.release.gpu on the slot's `ready`
//          producer  ld.acquire.gpu on `ready`; fence.proxy.async; cp.async.bulk
//          and back: the copies' mbarrier, the consumers' mbarrier (wgmma has read shared memory); fence.proxy.async;
//          red.release.gpu on `done`; decoder lane 0 ld.acquire.gpu on `done`; __syncwarp; st.global
// The PTX memory model (PTX ISA 8.9.5) orders a generic access and another thread block's async access by base
// causality order plus a proxy fence on the way, but has no rule for where fence.proxy.async must stand. "Mixed-Proxy
// Extensions for the NVIDIA PTX Memory Consistency Model" (ISCA 2022, 5.4) wants the fence in the thread block of the
// non-generic access: the producer's, in both directions. The decoder's own is belt and braces, once per 4096 weights.
//
// No deadlock: a decoder waits only for readers of earlier blocks, a reader only for blocks up to its own, and the
// producer gives slots back also while it waits for a later block. host_checks.h runs the protocol under random
// interleavings.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <stdint.h>

#include "common/nf4_levels.h"
#include "decode.h"
#include "plan.h"
#include "ptx.cuh"
#include "wgmma.cuh"

namespace lab {

struct Weight {
  int n, k;
  const uint8_t* codes;
  const uint8_t* absmax;
  const float* nested_map;
  const float* nested_absmax;
  float offset;
};

struct Params {
  Plan plan;
  Weight w;            // kRing
  uint8_t* workspace;  // counters, partial sums, ring
  uint32_t* stats;     // null, or kStatWords a thread block
  int* err;            // host-mapped, see fail_if
  bool publish_only;   // decoders touch nothing but the counters: wrong results, the protocol's own cost
};

// Cycles the producer waited for an empty stage, for a decoded block, its cycles in all, its steps; cycles decoder warp
// 0 waited for a slot, its cycles in all, its items.
enum Stat { kStatEmpty, kStatReady, kStatProducer, kStatSteps, kStatSlot, kStatDecoder, kStatItems, kStatWords };

// ---- shared memory: absolute addresses; the dynamic part starts at 0x400 in a kernel without a static part ----------
constexpr uint32_t kSmemStart = 0x400;
constexpr uint32_t kXBytes = kTileTokens * kStep * 2;
constexpr uint32_t kStagingBytes = 2 * 8192;  // a consumer warpgroup's
namespace smem {
constexpr uint32_t full = 0x400, empty = 0x440, pending = 0x480, work = 0x500, map = 0x800, w = 0x1000,
                   x = w + kStages * kTileBytes, staging = x + kStages * kXBytes, end = staging + 2 * kStagingBytes;
}
constexpr uint32_t kSmemBytes = smem::end - kSmemStart;
static_assert(kSmemBytes <= 232448 && smem::w % 1024 == 0 && smem::x % 1024 == 0 && smem::staging % 1024 == 0);

// ---- decode ---------------------------------------------------------------------------------------------------------
// An item on its way: what a lane loads for its four passes.
struct Loaded {
  uint4 codes[4];  // half of the pair's 32 bytes
  uint32_t absmax[4];
  float nested[4];
};
template <bool kBackward>
LAB_DEV void load_item(const Weight& w, const Block& b, int item, int lane, Loaded& v) {
  const int blocks = w.k / 64;
  const Origin origin = origin_of(kBackward, b);
#pragma unroll
  for (int pass = 0; pass < 4; ++pass) {
    const Piece piece = piece_of(kBackward, item, pass, lane);
    const int row = origin.row + piece.row, block = origin.block + piece.block;
    v.codes[pass] = make_uint4(0, 0, 0, 0), v.absmax[pass] = ~0u, v.nested[pass] = 0.0f;
    if (row < w.n && block < blocks) {
      const int64_t at = static_cast<int64_t>(row) * blocks + block;
      v.codes[pass] = __ldg(reinterpret_cast<const uint4*>(w.codes + at * 32 + (lane & 1) * 16));
      v.absmax[pass] = __ldg(w.absmax + at);
      v.nested[pass] = __ldg(w.nested_absmax + (at >> 8));
    }
  }
}
// Rows and blocks past the weight become zeros: the products with them must not be NaN.
template <bool kBackward>
LAB_DEV void store_item(const Loaded& v, uint32_t map, float offset, int item, int lane, uint8_t* slot) {
  const int h = lane & 1;
#pragma unroll
  for (int pass = 0; pass < 4; ++pass) {
    const Piece piece = piece_of(kBackward, item, pass, lane);
    const bool inside = v.absmax[pass] != ~0u;
    const float scale =
        inside ? __fadd_rn(__fmul_rn(__uint_as_float(lds32(map + 4 * (v.absmax[pass] & 255))), v.nested[pass]), offset)
               : 0.0f;
    // The pair's lane 0 holds words 0..3, lane 1 words 4..7; they want the even and the odd ones.
    const uint4 c = v.codes[pass];
    const uint32_t got0 = __shfl_xor_sync(0xffffffffu, h ? c.x : c.y, 1),
                   got1 = __shfl_xor_sync(0xffffffffu, h ? c.z : c.w, 1);
    const uint32_t word[4] = {h ? got0 : c.x, h ? got1 : c.z, h ? c.y : got0, h ? c.w : got1};
    const Table t = make_table(scale);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      uint4 out;
      look_up(t, word[j], out.x, out.y);
      look_up(t, word[j] >> 16, out.z, out.w);
      *reinterpret_cast<uint4*>(slot + piece.offset + (((2 * j + h) ^ (piece.row & 7)) << 4)) = out;
    }
  }
}

// ---- roles ----------------------------------------------------------------------------------------------------------
LAB_DEV int* counter(const Params& p, int word, int index) {
  return reinterpret_cast<int*>(p.workspace) + word + index * kCounterWords;
}
LAB_DEV uint8_t* ring_slot(const Params& p, uint32_t ring, int slot) {
  return p.workspace + ring + static_cast<size_t>(slot) * kSlotBytes;
}

template <bool kBackward>
LAB_DEV void decode_role(const Params& p, uint32_t sb, int warp, int lane, uint32_t ring) {
  const Plan& plan = p.plan;
  constexpr int kThreads = kDecodeWarps * 32;
  const int tid = warp * 32 + lane, workers = gridDim.x * kDecodeWarps;
  const uint32_t map = sb + smem::map, began = cycles();
  uint32_t waited = 0, items = 0;
  ItemWalk walk = start_items(plan, warp * gridDim.x + blockIdx.x);
  Loaded v = {};
  auto load = [&]() {
    if (p.publish_only) return;
    const Block b = block_of(plan, walk.v, walk.item / kItems - walk.base);
    load_item<kBackward>(p.w, b, walk.item % kItems, lane, v);
  };
  bool more = find_item(plan, walk);
  if (more) load();
  static_assert(kThreads * 3 >= 256 && kThreads * 2 < 256);
  const float map0 = __ldg(p.w.nested_map + tid), map1 = __ldg(p.w.nested_map + kThreads + tid);
  const float map2 = __ldg(p.w.nested_map + min(2 * kThreads + tid, 255));
  sts32(map + 4 * tid, __float_as_uint(map0)), sts32(map + 4 * (kThreads + tid), __float_as_uint(map1));
  if (2 * kThreads + tid < 256) sts32(map + 4 * (2 * kThreads + tid), __float_as_uint(map2));
  named_barrier(3, kThreads);
  while (more) {
    const int block = walk.item / kItems, slot = block % plan.slots, occupancy = block / plan.slots;
    if (occupancy > 0) {
      const uint32_t start = cycles();
      if (lane == 0) {
        const int* done = counter(p, kDoneWord, slot);
        while (load_acquire(done) - done_target(occupancy) < 0)
          sleep_ns(200), fail_late(start, p.err, kWaitDone, block, slot);
      }
      __syncwarp();
      waited += cycles() - start;
    }
    if (!p.publish_only) store_item<kBackward>(v, map, p.w.offset, walk.item % kItems, lane, ring_slot(p, ring, slot));
    walk.item += workers, ++items;
    more = find_item(plan, walk);
    if (more) load();  // flies while the stores below are waited for
    fence_async_global();
    __syncwarp();
    if (lane == 0) add_release(counter(p, kReadyWord, slot), 1);
  }
  if (p.stats && tid == 0) {
    uint32_t* stats = p.stats + kStatWords * blockIdx.x;
    stats[kStatSlot] = waited, stats[kStatDecoder] = cycles() - began, stats[kStatItems] = items;
  }
}

// One thread. Steps are numbered through; step L uses stage L % 4, whose barriers then end their phase L / 4.
template <bool kRing, bool kBackward, int kCluster>
LAB_DEV void produce_role(const CUtensorMap* map_x, const CUtensorMap* map_w, const Params& p, uint32_t sb,
                          uint32_t rank, uint32_t ring) {
  const Plan& plan = p.plan;
  const int seat = blockIdx.x / kCluster;
  const uint32_t full = sb + smem::full, empty = sb + smem::empty;
  const uint32_t began = cycles();
  uint32_t load = 0, waited = 0, starved = 0;

  // Blocks read but not yet given back, oldest first: {last step, slot, weight} in shared memory; never more than five.
  // Steps below `freed` are known to be consumed. The others' barriers may be asked, as their stages' next steps have
  // not been sent for; older ones may not: the phase's parity could be that of the one after the next.
  uint32_t head = 0, tail = 0, freed = 0;
  auto retire = [&]() {
    while (tail != head) {
      const uint32_t entry = sb + smem::pending + (tail & 7) * 16, last = lds32(entry);
      if (last >= freed && !mbar_test_wait(empty + 8 * (last & 3), (last >> 2) & 1)) return;
      fence_async_global();
      add_release(counter(p, kDoneWord, lds32(entry + 4)), lds32(entry + 8));
      ++tail;
    }
  };

  int base = 0;
  for (int w = 0; w < plan.waves; ++w) {
    const Wave wave = wave_of(plan, w);
    const Work work = work_of(plan, wave, seat);
    if (work.any) {
      const int out0 = (work.strip_unit * kCluster + rank) * kTileOut, m0 = work.token_tile * kTileTokens;
      // For the consumers, published by the first step's barrier. The producer is at most five units ahead.
      const uint32_t order = sb + smem::work + (w & 7) * 16;
      sts32(order, out0), sts32(order + 4, m0);
      sts32(order + 8, work.steps), sts32(order + 12, work.part << 16 | (work.tail * kCluster + rank));
      const int* ready = nullptr;
      const uint8_t* source = nullptr;
      int slot = 0, target = 0;
      bool up = true;
      for (int s = 0; s < work.steps; ++s, ++load) {
        const uint32_t stage = load & 3;
        if constexpr (kRing) {
          if (s % kChunkSteps == 0) {  // asked before the wait for the stage, which mostly takes longer than the answer
            const int block = base + s / kChunkSteps * wave.columns + work.column + rank;
            slot = block % plan.slots, target = ready_target(block / plan.slots);
            ready = counter(p, kReadyWord, slot), source = ring_slot(p, ring, slot);
            up = load_acquire(ready) - target >= 0;
          }
        }
        const uint32_t before = cycles();
        // A fresh barrier counts as past the phase of parity 1: the first round does not wait.
        mbar_wait(empty + 8 * stage, ((load >> 2) & 1) ^ 1, p.err, kWaitEmpty, load);
        waited += cycles() - before;
        freed = load < 3 ? 0 : load - 3;

        const uint32_t bar = full + 8 * stage, x = sb + smem::x + stage * kXBytes,
                       tile = sb + smem::w + stage * kTileBytes;
        const int at = (work.chunk * kChunkSteps + s) * kStep;
        mbar_arrive_expect(bar, kXBytes + kTileBytes);
        if constexpr (kCluster == 1) {
          tma_load(x, map_x, bar, at, m0);
          tma_load(x + kXBytes / 2, map_x, bar, at, m0 + 128);
        } else {  // each of the two fetches a half for both
          tma_load_multicast(x + rank * (kXBytes / 2), map_x, bar, at, m0 + rank * 128, 3);
        }
        if constexpr (kRing) {
          if (!up) {
            const uint32_t start = cycles();
            while (load_acquire(ready) - target < 0) retire(), fail_late(start, p.err, kWaitReady, load, slot);
            starved += cycles() - start;
            up = true;
          }
          if (s % kChunkSteps == 0) fence_async_global();
          bulk_load(tile, source + s % kChunkSteps * kTileBytes, kTileBytes, bar);
          if (s % kChunkSteps == kChunkSteps - 1 || s == work.steps - 1) {
            const uint32_t entry = sb + smem::pending + (head++ & 7) * 16;
            sts32(entry, load), sts32(entry + 4, slot), sts32(entry + 8, work.weight);
          }
          retire();  // behind the copies: its release waits some hundred cycles
        } else if constexpr (kBackward) {
          tma_load(tile, map_w, bar, out0, at);
          tma_load(tile + kTileBytes / 2, map_w, bar, out0 + 64, at);
        } else {
          tma_load(tile, map_w, bar, at, out0);
        }
      }
    }
    base += wave.columns * wave.chunks;
  }
  if constexpr (kRing) {  // others may wait for these slots
    const uint32_t start = cycles();
    while (tail != head) retire(), fail_late(start, p.err, kWaitDrain, load, tail);
  }
  if (p.stats) {
    uint32_t* stats = p.stats + kStatWords * blockIdx.x;
    stats[kStatEmpty] = waited, stats[kStatReady] = starved, stats[kStatProducer] = cycles() - began,
    stats[kStatSteps] = load;
  }
}

// The last of all producers and decoder warps to come here zeroes the counters for the next launch.
LAB_DEV void leave(const Params& p, int lane) {
  __syncwarp();
  int last = 0;
  if (lane == 0)
    last = fetch_add(counter(p, kTicketWord, 0), 1) == static_cast<int>(gridDim.x) * (kDecodeWarps + 1) - 1;
  if (__shfl_sync(0xffffffffu, last, 0) == 0) return;
#pragma unroll 1
  for (int i = lane; i < p.plan.slots; i += 32) *counter(p, kReadyWord, i) = 0, *counter(p, kDoneWord, i) = 0;
  if (lane == 0) *counter(p, kTicketWord, 0) = 0;
}

// Tokens 64 q.. of a warp's 16 rows, as bf16, into a staging tile of 64 tokens x 128 bytes.
LAB_DEV void stage_quarter(const float (&d)[128], int q, uint32_t tile, int warp, int lane) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const float* v = d + (q * 8 + j * 2) * 4;
    stmatrix4_trans(tile + staging_offset(warp, lane, j), pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]),
                    pack_bf16(v[4], v[5]), pack_bf16(v[6], v[7]));
  }
}

template <bool kBackward, int kCluster>
LAB_DEV void consume_role(const CUtensorMap* map_y, const Params& p, uint32_t sb, int cw, int warp, int lane) {
  const uint32_t full = sb + smem::full, empty = sb + smem::empty;
  const uint64_t desc_x = make_desc(sb + smem::x), desc_w = make_desc(sb + smem::w + cw * (kTileBytes / 2));
  const uint32_t staging = sb + smem::staging + cw * kStagingBytes;
  const int tid = warp * 32 + lane, split = p.plan.split;
  const bool first = tid == 0;
  const int seats = gridDim.x / kCluster, last_units = (p.plan.units - (p.plan.waves - 1) * seats) * split;
  const int units = p.plan.waves - (static_cast<int>(blockIdx.x / kCluster) >= last_units);
  float d[128];
  uint32_t load = 0;
  auto release = [&](uint32_t stage) {
    __syncwarp();
    if constexpr (kCluster == 1) {
      if (lane == 0) mbar_arrive(empty + 8 * stage);
    } else {
      if (lane < kCluster) mbar_arrive_remote(empty + 8 * stage, lane);
    }
  };
  for (int u = 0; u < units; ++u) {
    const uint32_t order = sb + smem::work + (u & 7) * 16;
    mbar_wait(full + 8 * (load & 3), (load >> 2) & 1, p.err, kWaitFull, load);
    const int steps = lds32(order + 8);
    for (int i = 0; i < steps; ++i) {
      const uint32_t stage = load & 3;
      mbar_wait(full + 8 * stage, (load >> 2) & 1, p.err, kWaitFull, load);
      const uint64_t dx = desc_x + static_cast<uint64_t>(stage * (kXBytes >> 4)),
                     dw = desc_w + static_cast<uint64_t>(stage * (kTileBytes >> 4));
      wgmma_fence();
#pragma unroll
      for (int q = 0; q < 4; ++q)
        wgmma<kBackward>(d, dw + kDescStep<kBackward> * q, dx + kDescStep<false> * q, q > 0 || i > 0);
      wgmma_commit();
      wgmma_wait<1>();
      if (i > 0) release((load - 1) & 3);
      ++load;
    }
    wgmma_wait<0>();
    release((load - 1) & 3);
#pragma unroll
    for (int q = 0; q < 128; ++q) asm volatile("" : "+f"(d[q])::"memory");  // no read of an accumulator above the wait

    if (split > 1 && u == p.plan.waves - 1) {
      // Thread by thread, in the accumulators' order: both sides hold the same fragment.
      const int part = lds32(order + 12) >> 16;
      // Read each time: the accumulators leave few registers.
      auto index = [&](int i) { return static_cast<int>(lds32(order + 12) & 0xffff) * (split - 1) + i; };
      auto flag = [&](int i) { return counter(p, kPartialFlagWord, index(i) * 2 + cw); };
      auto partial = [&](int i) {
        return reinterpret_cast<float4*>(p.workspace + kHeaderBytes + static_cast<size_t>(index(i)) * kPartialBytes +
                                         cw * (kPartialBytes / 2)) +
               tid;
      };
      if (part > 0) {
        float4* to = partial(part - 1);
#pragma unroll
        for (int q = 0; q < 32; ++q)
          __stcg(to + q * 128, make_float4(d[4 * q], d[4 * q + 1], d[4 * q + 2], d[4 * q + 3]));
        named_barrier(1 + cw, 128);
        if (first) add_release(flag(part - 1), 1);
        continue;
      }
      for (int i = 0; i < split - 1; ++i) {
        if (first) {
          const uint32_t start = cycles();
          while (load_acquire(flag(i)) == 0) sleep_ns(50), fail_late(start, p.err, kWaitPartial, u, i);
          *flag(i) = 0;  // for the next launch
        }
        named_barrier(1 + cw, 128);
        const float4* from = partial(i);
#pragma unroll
        for (int q = 0; q < 32; ++q) {
          const float4 v = __ldcg(from + q * 128);
          d[4 * q] += v.x, d[4 * q + 1] += v.y, d[4 * q + 2] += v.z, d[4 * q + 3] += v.w;
          if (q % 16 == 15) __syncwarp();  // as many loads in flight as there are registers for
        }
      }
    }

    const int out0 = lds32(order) + cw * 64, m0 = lds32(order + 4);
    // 64 of out x 256 tokens leave in four quarters through two staging tiles.
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const uint32_t tile = staging + (q & 1) * 8192;
      if (first) bulk_wait_read<1>();
      named_barrier(1 + cw, 128);
      stage_quarter(d, q, tile, warp, lane);
      fence_async_shared();
      named_barrier(1 + cw, 128);
      if (first) {
        if (out0 < p.plan.out && m0 + q * 64 < p.plan.m) tma_store(map_y, tile, out0, m0 + q * 64);
        bulk_commit();
      }
    }
  }
  if (first) bulk_wait_all();
}

constexpr int kGemmThreads = 384;

template <bool kRing, bool kBackward, int kCluster>
__global__ void __launch_bounds__(kGemmThreads, 1)
    gemm(const __grid_constant__ CUtensorMap map_x, const __grid_constant__ CUtensorMap map_w,
         const __grid_constant__ CUtensorMap map_y, const __grid_constant__ Params p, const uint32_t ring) {
  extern __shared__ __align__(1024) uint8_t smem_raw[];
  const uint32_t sb = smem_u32(smem_raw) - kSmemStart;  // zero, or the block's rank in the cluster << 24
  const bool misplaced = (sb & 0xFFFFFFu) != 0;
  fail_if(misplaced, misplaced, p.err, kSmemBase, sb, 0);
  const int tid = threadIdx.x, warp = __shfl_sync(0xffffffffu, tid >> 5, 0), lane = tid & 31, wg = warp >> 2;
  const uint32_t rank = kCluster == 1 ? 0 : cluster_rank();

  if (tid == 0) {
    prefetch_map(&map_x), prefetch_map(&map_y);
    if constexpr (!kRing) prefetch_map(&map_w);
    for (int s = 0; s < kStages; ++s)
      mbar_init(sb + smem::full + 8 * s, 1), mbar_init(sb + smem::empty + 8 * s, 8 * kCluster);
    mbar_init_fence();
  }
  __syncthreads();
  if constexpr (kCluster > 1) cluster_sync();

  // Registers change hands within what the block started with, 384 x 168: 128 (88 + 2 x 208), or 128 (56 + 2 x 224).
  // One more, and the consumers wait for ever.
  if (wg == 0) {
    if constexpr (kRing)
      asm volatile("setmaxnreg.dec.sync.aligned.u32 88;");
    else
      asm volatile("setmaxnreg.dec.sync.aligned.u32 56;");
    if (warp == 0) {
      if (lane == 0) produce_role<kRing, kBackward, kCluster>(&map_x, &map_w, p, sb, rank, ring);
      if constexpr (kRing) leave(p, lane);
    } else if constexpr (kRing) {
      decode_role<kBackward>(p, sb, warp - 1, lane, ring);
      leave(p, lane);
    }
  } else {
    if constexpr (kRing)
      asm volatile("setmaxnreg.inc.sync.aligned.u32 208;");
    else
      asm volatile("setmaxnreg.inc.sync.aligned.u32 224;");
    consume_role<kBackward, kCluster>(&map_y, p, sb, wg - 1, warp & 3, lane);
  }
  if constexpr (kCluster > 1) {  // a block's barriers must outlive its peer's last arrival
    __syncwarp();
    cluster_sync();
  }
}

// ---- two launches ---------------------------------------------------------------------------------------------------
constexpr int kSlabThreads = 512, kSlabPieces = 2;
// Rows row.. and 64-blocks block.. of w as row-major bf16. A thread decodes two pieces of 8 weights; every lane has its
// own copy of the levels, so no two meet in a bank.
__global__ void __launch_bounds__(kSlabThreads)
    dequantise_slab(const Weight w, int row0, int rows, int block0, int blocks, uint4* out) {
  __shared__ float levels[16 * 32];
  levels[threadIdx.x] = fastpeft::nf4_level(threadIdx.x >> 5);
  __syncthreads();
  const int lane = threadIdx.x & 31, per_row = blocks * 8, pieces = rows * per_row;
#pragma unroll
  for (int i = 0; i < kSlabPieces; ++i) {
    const int piece = (blockIdx.x * kSlabPieces + i) * kSlabThreads + threadIdx.x;
    if (piece >= pieces) return;
    const int64_t at = static_cast<int64_t>(row0 + piece / per_row) * (w.k / 64) + block0 + piece % per_row / 8;
    const uint32_t word = __ldg(reinterpret_cast<const uint32_t*>(w.codes + at * 32) + piece % 8);
    const float scale =
        __fadd_rn(__fmul_rn(__ldg(w.nested_map + __ldg(w.absmax + at)), __ldg(w.nested_absmax + (at >> 8))), w.offset);
    uint32_t v[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const uint32_t byte = word >> (8 * j);
      v[j] = pack_bf16(__fmul_rn(levels[(byte >> 4 & 15) * 32 + lane], scale),
                       __fmul_rn(levels[(byte & 15) * 32 + lane], scale));
    }
    out[piece] = make_uint4(v[0], v[1], v[2], v[3]);
  }
}

}  // namespace lab
