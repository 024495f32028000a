// NF4 product for up to 256 tokens on Hopper, forward: y[m, n] = x[m, k] @ W[n, k]^T (+ bias).
//
// Layout   as nf4_linear_tiles_kernel.cuh, whose plan, sharing of units and storing of y this kernel uses.
// Plan     The weights are wgmma's first operand, decoded straight into the registers of the warps that multiply: of a
//          word of eight codes each lane of a quad needs one byte, a pair of neighbours in k, and takes it through a
//          table of 256 pairs in shared memory. Every lane has a copy of the table in banks of its own, and its lines
//          of 256 bytes lie at an offset of 65536, so that one byte permutation makes an address: half an instruction
//          a weight, where looking up in registers (the tile kernel) takes more than three, on a pipe of half the rate.
//          While a step is multiplied, the next is looked up.
//          A thread block has a warpgroup that fetches and warpgroups for two strips of 64 rows. Up to 64 tokens two
//          warpgroups share a strip and take every second step of 64 k; their sums meet in shared memory.
// Numerics Up to 64 tokens: levels rounded to T, the scale applied in float32 to the sum over a step (as for up to 16
//          tokens). Above: level times scale in float32, rounded once to T (as nf4_dequantize).
// Source   fragment layout: PTX ISA 9.7.15.5.1; pair table: FLUTE (arXiv 2407.10960).
#pragma once

#include "cuda/nf4_linear_tiles_kernel.cuh"

namespace fastpeft::cuda::nf4_fragments {

using nf4_tiles::ChunkWalk;
using nf4_tiles::Item;
using nf4_tiles::kChunkSteps;
using nf4_tiles::kStep;
using nf4_tiles::kTileOut;
using nf4_tiles::Problem;

constexpr int kStrips = 2;  // of 64 rows, in a tile

// The weights whose rows follow each other. No tile has rows of two.
template <int kCount>
struct Weights {
  CUtensorMap codes[kCount];
  NF4View w[kCount];
  int first[kCount];  // of the rows

  __device__ int of(int row) const {
    int which = 0;
#pragma unroll
    for (int i = 1; i < kCount; ++i) which += row >= first[i];
    return which;
  }
};

template <int kTokens_>
struct Config {
  static constexpr int kTokens = kTokens_, kCluster = 1;
  static constexpr bool kExperts = false;
  static constexpr int kSplits = kTokens <= 64 ? 2 : 1;  // warpgroups of a strip, and steps of a stage
  static constexpr int kGroups = kStrips * kSplits;
  static constexpr int kThreads = 128 * (kGroups + 1);
  // Registers change hands within what the block starts with.
  static constexpr int kFetchRegisters = kGroups == 4 ? 32 : 24, kMultiplyRegisters = kGroups == 4 ? 112 : 240;
  static constexpr bool kScaleSums = kTokens <= 64;
  static constexpr int kBuffers = kTokens == 64 ? 1 : 2;  // of decoded weights; 64 tokens leave registers for one
  static constexpr int kOwn = kChunkSteps / kSplits;      // steps of a warpgroup in a chunk, a stage each
  static constexpr int kStages = kTokens == 32 ? 6 : kTokens == 64 ? 5 : 3;
  static constexpr int kStoreTokens = kTokens < 64 ? kTokens : 64;
  static constexpr uint32_t kXBytes = kTokens * kStep * 2;     // of a step
  static constexpr uint32_t kLineBytes = kStep / 2 * kSplits;  // of a row's codes in a stage
  static constexpr uint32_t kCodeBytes = kTileOut * kLineBytes;
  static constexpr uint32_t kScaleBytes = kSplits * kTileOut * 4;  // of a stage
  static constexpr uint32_t kStagingBytes = kStoreTokens * 128;    // of a strip

  // Offsets in the shared window, where a thread block's own memory begins at 1024 or before.
  static constexpr uint32_t kFirst = 1024, table = 65536, kTableEnd = 2 * table;
  static constexpr uint32_t codes = kFirst, staging = codes + kStages * kCodeBytes,
                            scales = staging + kStrips * kStagingBytes, kLowEnd = scales + kStages * kScaleBytes;
  static constexpr uint32_t x = kTableEnd, map = x + kStages * kSplits * kXBytes, full = map + 1024,
                            empty = full + 8 * kStages, last = empty + 8 * kStages, end = last + 16;
  static constexpr unsigned kBytes = end;
  static_assert(kLowEnd <= table && kBytes <= nf4_tiles::kSmemBytes + kFirst && codes % 1024 == 0 &&
                staging % 1024 == 0);
};

// The table's entry for a byte of codes, of this lane: one word in T, or two in float32.
template <bool kFloats, typename T, int kWarps>
__device__ void fill_table(uint32_t table) {
  const int lane = threadIdx.x % 32;
  const float level = nf4_level(lane % 16);
  for (int high = threadIdx.x / 32; high < 16; high += kWarps) {
    const float first = __shfl_sync(0xffffffff, level, high);
#pragma unroll
    for (int low = 0; low < 16; ++low) {
      const float second = __shfl_sync(0xffffffff, level, low);
      const uint32_t line = table + (16 * high + low) * 256;
      if constexpr (kFloats) {
        asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(line + 8 * lane), "f"(first), "f"(second) : "memory");
      } else {
        store_shared_word(line + 4 * lane, pack_pair<T>(first, second));
      }
    }
  }
}

// --- fetching --------------------------------------------------------------------------------------------------------

// One thread. The first stages' codes are asked for while the kernel before still runs: what writes weights never lets
// the next kernel start early (device/ptx.cuh), so they are there; x is not before it has ended.
template <typename C, int kCount>
__device__ void fetch(const CUtensorMap* map_x, const Weights<kCount>& weights, const Problem& p) {
  ChunkWalk here{};
  const auto codes = [&](int at, int o) {
    const uint32_t full = C::full + 8 * at;
    barrier_arrive_expect(full, C::kCodeBytes + C::kSplits * C::kXBytes);
    const int which = weights.of(here.out0);
    tma_load(C::codes + at * C::kCodeBytes, &weights.codes[which], full,
             (here.chunk * kChunkSteps + o * C::kSplits) * (kStep / 2), here.out0 - weights.first[which]);
  };
  int early = 0;
  for (enter(p.plan, blockIdx.x, here); here.more && early < C::kStages; advance(p.plan, blockIdx.x, here)) {
    for (int o = 0; o < C::kOwn && early < C::kStages; ++o, ++early) codes(early, o);
  }
  wait_for_kernel_before();
  Ring stage{0, 1};
  here = {};
  for (enter(p.plan, blockIdx.x, here); here.more; advance(p.plan, blockIdx.x, here)) {
    for (int o = 0; o < C::kOwn; ++o, --early) {
      if (early <= 0) {
        barrier_wait(C::empty + 8 * stage.at, stage.parity);
        codes(stage.at, o);
      }
#pragma unroll
      for (int i = 0; i < C::kSplits; ++i) {
        tma_load(C::x + (stage.at * C::kSplits + i) * C::kXBytes, map_x, C::full + 8 * stage.at,
                 (here.chunk * kChunkSteps + o * C::kSplits + i) * kStep, here.m0);
      }
      stage.advance<C::kStages>();
    }
  }
}

// Two warps, one a strip: the scales of a stage's steps, two rows a lane. They run ahead as far as the ring allows,
// which hides their loads.
template <typename C, int kCount>
__device__ void fetch_scales(const Weights<kCount>& weights, const Problem& p, int strip) {
  const int lane = threadIdx.x % 32;
  const bool nested = weights.w[0].nested_absmax != nullptr;
  float offset = nested ? __ldg(weights.w[0].offset) : 0.0f;
  if (ChunkWalk first{}; enter(p.plan, blockIdx.x, first), first.more) {  // on their way while the map is filled
    const int which = weights.of(first.out0);
    const NF4View& w = weights.w[which];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = first.out0 + strip * 64 + 32 * i + lane;
      const uint32_t block = (static_cast<uint32_t>(row - weights.first[which]) * static_cast<uint32_t>(p.k / 64) +
                              static_cast<uint32_t>(first.chunk * kChunkSteps)) >>
                             p.block_shift;
      if (row >= p.n || !nested) continue;
      prefetch_l1(static_cast<const uint8_t*>(w.absmax) + block);
      prefetch_l1(w.nested_absmax + block / static_cast<uint32_t>(kNestedBlock));
    }
  }
  named_barrier(5, 128 * C::kGroups + 32 * kStrips);
  const auto level = [](uint32_t code) { return __uint_as_float(load_shared_word(C::map + 4 * (code & 255))); };
  Ring stage{0, 1};
  ChunkWalk here{};
  for (enter(p.plan, blockIdx.x, here); here.more; advance(p.plan, blockIdx.x, here)) {
    float scale[2][kChunkSteps];
    const int blocks = p.k / 64, first = here.chunk * kChunkSteps;
    const int which = weights.of(here.out0);
    const NF4View& w = weights.w[which];
    if constexpr (kCount > 1) offset = __ldg(w.offset);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = here.out0 + strip * 64 + 32 * i + lane;
      const uint32_t at = static_cast<uint32_t>(row - weights.first[which]) * static_cast<uint32_t>(blocks) +
                          static_cast<uint32_t>(first);
#pragma unroll
      for (int s = 0; s < kChunkSteps; ++s) scale[i][s] = 0.0f;
      if (row >= p.n) continue;
      if (p.wide_scales) {
        const float outer = __ldg(w.nested_absmax + at / static_cast<uint32_t>(kNestedBlock));
        const uint32_t codes = __ldg(reinterpret_cast<const uint32_t*>(static_cast<const uint8_t*>(w.absmax) + at));
#pragma unroll
        for (int s = 0; s < kChunkSteps; ++s) {
          scale[i][s] = __fadd_rn(mul_ftz(level(codes >> (8 * s)), outer), offset);
        }
        continue;
      }
#pragma unroll
      for (int s = 0; s < kChunkSteps; ++s) {
        if (first + s >= blocks) continue;
        const uint32_t block = (at + s) >> p.block_shift;
        scale[i][s] = nested ? __fadd_rn(mul_ftz(level(__ldg(static_cast<const uint8_t*>(w.absmax) + block)),
                                                 __ldg(w.nested_absmax + block / static_cast<uint32_t>(kNestedBlock))),
                                         offset)
                             : __ldg(static_cast<const float*>(p.w.absmax) + block);
      }
    }
#pragma unroll
    for (int o = 0; o < C::kOwn; ++o) {
      barrier_wait(C::empty + 8 * stage.at, stage.parity);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int s = 0; s < C::kSplits; ++s) {
          store_shared_word(C::scales + stage.at * C::kScaleBytes + s * 4 * kTileOut + 4 * (strip * 64 + 32 * i + lane),
                            __float_as_uint(scale[i][o * C::kSplits + s]));
        }
      }
      __syncwarp();
      if (lane == 0) barrier_arrive(C::full + 8 * stage.at);
      stage.advance<C::kStages>();
    }
  }
}

// --- multiplying -----------------------------------------------------------------------------------------------------

// wgmma's first operand for 32 k of rows r and r + 8, sixteen bytes of codes each. `lane_entry` and `selectors` make an
// entry's address of a word. Look-ups stay where they stand, so that no more than these words wait in registers.
template <typename T, bool kScaleSums>
__device__ inline void look_up(const uint4& low_codes, const uint4& high_codes, float low, float high,
                               uint32_t lane_entry, uint32_t selectors, uint32_t* a) {
  const uint32_t words[] = {low_codes.x, high_codes.x, low_codes.y, high_codes.y,
                            low_codes.z, high_codes.z, low_codes.w, high_codes.w};
#pragma unroll
  for (int i = 0; i < 8; ++i) {  // of slab i / 4: rows r and r + 8 at its first eight k, then at its last
    const uint32_t at = permute_bytes(words[i], lane_entry, selectors);
    if constexpr (kScaleSums) {
      asm volatile("ld.shared.b32 %0, [%1];" : "=r"(a[i]) : "r"(at));
    } else {
      float first, second;
      asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(first), "=f"(second) : "r"(at));
      const float scale = i % 2 == 0 ? low : high;
      a[i] = pack_pair<T>(mul_ftz(first, scale), mul_ftz(second, scale));
    }
  }
}

// The sums of a strip's second warpgroup are added to the first's, through the strip's staging memory.
template <typename C>
__device__ void add_splits(float (&d)[C::kTokens / 2], int strip, int split) {
  constexpr int kEach = C::kStagingBytes / 512;
  const int thread = threadIdx.x % 128;
  const uint32_t at = C::staging + strip * C::kStagingBytes + 16 * thread;
  if (split == 0 && thread == 0) tma_wait_read<0>();  // what is stored from there
#pragma unroll
  for (int first = 0; first < C::kTokens / 2; first += kEach) {
    named_barrier(3 + strip, 256);
    if (split == 1) {
#pragma unroll
      for (int i = 0; i < kEach; i += 4) {
        store_shared(at + 512 * i, make_uint4(__float_as_uint(d[first + i]), __float_as_uint(d[first + i + 1]),
                                              __float_as_uint(d[first + i + 2]), __float_as_uint(d[first + i + 3])));
      }
    }
    named_barrier(3 + strip, 256);
    if (split == 0) {
#pragma unroll
      for (int i = 0; i < kEach; i += 4) {
        const uint4 v = load_shared(at + 512 * i);
        d[first + i] += __uint_as_float(v.x), d[first + i + 1] += __uint_as_float(v.y);
        d[first + i + 2] += __uint_as_float(v.z), d[first + i + 3] += __uint_as_float(v.w);
      }
    }
  }
}

// Makes d the sum of a shared unit's parts in the warpgroup that comes last; false in the others. All parts are written
// and that one adds them in their order: one meeting, where the tree of the tile kernel has log2(parts), which pays
// while a part is small.
template <typename C>
__device__ bool add_parts(const Problem& p, const Item& item, float (&d)[C::kTokens / 2], int strip) {
  constexpr int kTokens = C::kTokens, kAtOnce = 4;
  const int thread = threadIdx.x % 128, first_slot = item.last_slot - (item.parts - 1);
  const auto partial = [&](int part) {
    return reinterpret_cast<float4*>(p.workspace + (first_slot + part) * nf4_tiles::partial_bytes(kTokens) +
                                     strip * (nf4_tiles::partial_bytes(kTokens) / 2)) +
           thread;
  };
  float4* mine = partial(item.part);
#pragma unroll
  for (int i = 0; i < kTokens / 8; ++i) {
    __stcg(mine + i * 128, make_float4(d[4 * i], d[4 * i + 1], d[4 * i + 2], d[4 * i + 3]));
  }
  named_barrier(1 + strip, 128);
  unsigned* counter = p.counters + (first_slot * kStrips + strip) * nf4_tiles::kCountersEach;
  const uint32_t word = C::last + 4 * strip;
  if (thread == 0) store_shared_word(word, atomic_increment_synchronising(counter, item.parts - 1));
  named_barrier(1 + strip, 128);
  if (load_shared_word(word) != static_cast<uint32_t>(item.parts - 1)) return false;
#pragma unroll
  for (int first = 0; first < kTokens / 8; first += kAtOnce) {
    float4 sum[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) sum[i] = __ldcg(partial(0) + (first + i) * 128);
    for (int part = 1; part < item.parts; ++part) {
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const float4 v = __ldcg(partial(part) + (first + i) * 128);
        sum[i].x += v.x, sum[i].y += v.y, sum[i].z += v.z, sum[i].w += v.w;
      }
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      float* to = d + 4 * (first + i);
      to[0] = sum[i].x, to[1] = sum[i].y, to[2] = sum[i].z, to[3] = sum[i].w;
    }
  }
  return true;
}

template <typename T, typename C>
__device__ void multiply(const CUtensorMap* map_y, const Problem& p, int group) {
  constexpr int kSums = C::kTokens / 2, kOwn = C::kOwn;
  static_assert(kOwn % C::kBuffers == 0);
  const int strip = group % kStrips, split = group / kStrips;
  const int warp = __shfl_sync(0xffffffff, threadIdx.x / 32 % 4, 0), first_row = strip * 64 + warp * 16;
  const uint64_t desc_x = wgmma_descriptor(C::x + split * C::kXBytes);

  Ring look{0, 0};  // the stage that is looked up next
  int stage = 0;    // that is multiplied
  uint32_t a[C::kBuffers][16];
  // The lane, read anew at every use: what is derived from it then sits in no register meanwhile.
  const auto read_lane = [] {
    uint32_t lane;
    asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
    return lane;
  };
  const auto scale_of = [&](int which, int row) {
    const uint32_t at = C::scales + which * C::kScaleBytes + split * 4 * kTileOut + 4 * first_row;
    return __uint_as_float(load_shared_word(at + (read_lane() & ~3u) + 4 * row));
  };
  const auto decode = [&](uint32_t(&to)[16]) {
    barrier_wait(C::full + 8 * look.at, look.parity);
    float low = 0.0f, high = 0.0f;
    if constexpr (!C::kScaleSums) low = scale_of(look.at, 0), high = scale_of(look.at, 8);
    const uint32_t lane = read_lane(), row = lane / 4;
    const uint32_t lane_entry = C::table | (C::kScaleSums ? 4 : 8) * lane, selectors = 0x7604 | lane % 4 << 4;
    // Under TMA's swizzle of 32 or 64 bytes; row + 8 has the same.
    const uint32_t swizzle = C::kSplits == 2 ? row / 2 % 4 : row / 4 % 2;
    const uint32_t from =
        C::codes + look.at * C::kCodeBytes + (first_row + row) * C::kLineBytes + ((2 * split ^ swizzle) << 4);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t at = from ^ half << 4;
      const uint4 low_codes = load_shared(at), high_codes = load_shared(at + 8 * C::kLineBytes);
      look_up<T, C::kScaleSums>(low_codes, high_codes, low, high, lane_entry, selectors, to + 8 * half);
    }
    look.advance<C::kStages>();
  };
  const auto start = [&](auto& sums, const uint32_t(&weights)[16], bool fresh) {
    const uint64_t x = desc_x + stage * (C::kSplits * C::kXBytes >> 4);
    wgmma_fence();
#pragma unroll
    for (int t = 0; t < kStep / 16; ++t) {
      wgmma_registers<T, C::kTokens>(sums, weights + 4 * t, x + kDescriptorStep<false> * t, !fresh || t > 0);
    }
    wgmma_commit();
  };
  const auto release = [&](int which) {
    __syncwarp();
    if (read_lane() == 0) barrier_arrive(C::empty + 8 * which);
  };

  Item item;
  for (int index = 0; find_item(p.plan, blockIdx.x, index, item); ++index) {
    const int chunks = item.chunks;
    float d[kSums];
#pragma unroll
    for (int i = 0; i < kSums; ++i) d[i] = 0.0f;
    if constexpr (C::kBuffers == 2) decode(a[0]);
    int before = 0;
    for (int chunk = 0; chunk < chunks; ++chunk) {
#pragma unroll
      for (int o = 0; o < kOwn; ++o) {
        uint32_t(&now)[16] = a[o % C::kBuffers];
        uint32_t(&next)[16] = a[(o + 1) % C::kBuffers];
        const bool more = o + 1 < kOwn || chunk + 1 < chunks;
        if constexpr (C::kBuffers == 1) decode(now);
        if constexpr (C::kScaleSums) {
          float sums[kSums];
          const float low = scale_of(stage, 0), high = scale_of(stage, 8);
          start(sums, now, true);
          if (C::kBuffers == 2 && more) decode(next);
          wgmma_wait<0>();
          release(stage);
#pragma unroll
          for (int i = 0; i < kSums; ++i) {
            asm volatile("" : "+f"(sums[i])::"memory");  // no use of a sum before the wait
            d[i] = fmaf(i % 4 < 2 ? low : high, sums[i], d[i]);
          }
        } else {
          start(d, now, false);
          wgmma_wait<1>();
          if (o > 0 || chunk > 0) release(before);
          if (more) decode(next);
        }
        before = stage;
        if (++stage == C::kStages) stage = 0;
      }
    }
    if constexpr (!C::kScaleSums) {
      wgmma_wait<0>();
      release(before);
#pragma unroll
      for (int i = 0; i < kSums; ++i) asm volatile("" : "+f"(d[i])::"memory");
    }
    if constexpr (C::kSplits == 2) {
      add_splits<C>(d, strip, split);
      if (split == 1) continue;
    }
    asm volatile("" : "+r"(index));  // found again rather than kept in registers through the loop
    find_item(p.plan, blockIdx.x, index, item);
    if (item.parts > 1) {
      if constexpr (C::kTokens <= nf4_tiles::kMostFlatTokens) {
        if (!add_parts<C>(p, item, d, strip)) continue;
      } else {
        if (!nf4_tiles::add_parts<C>(p, item, d, 0, strip, 0)) continue;
      }
    }
    nf4_tiles::store<T, C>(map_y, p, item.out0, item.m0, p.plan.m, d, 0, strip, p.add_to_y);
  }
  if (threadIdx.x % 128 == 0) tma_wait();
}

// --- kernel ----------------------------------------------------------------------------------------------------------

template <typename T, int kTokens, int kCount>
__global__ void __launch_bounds__(Config<kTokens>::kThreads, 1)
    kernel(const __grid_constant__ CUtensorMap map_x, const __grid_constant__ CUtensorMap map_y,
           const __grid_constant__ Weights<kCount> weights, const __grid_constant__ Problem p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using C = Config<kTokens>;
  extern __shared__ uint8_t smem_raw[];
  if (shared_offset(smem_raw) > C::kFirst) __trap();  // offsets are absolute
  if (threadIdx.x == 0) {
    tma_prefetch(&map_x);
#pragma unroll
    for (int i = 0; i < kCount; ++i) tma_prefetch(&weights.codes[i]);
    if (p.store_by_tma) tma_prefetch(&map_y);
    for (int s = 0; s < C::kStages; ++s) {
      barrier_init(C::full + 8 * s, 1 + kStrips);
      barrier_init(C::empty + 8 * s, 4 * C::kGroups);
    }
    barrier_init_fence();
  }
  __syncthreads();
  let_next_kernel_start();
  const int warpgroup = __shfl_sync(0xffffffff, threadIdx.x / 128, 0);
  if (warpgroup == C::kGroups) {
    give_registers<C::kFetchRegisters>();
    const int warp = __shfl_sync(0xffffffff, threadIdx.x / 32 % 4, 0);
    if (warp < kStrips) {
      fetch_scales<C>(weights, p, warp);
    } else if (threadIdx.x % 32 == 0 && warp == kStrips) {
      fetch<C>(&map_x, weights, p);
    }
    return;
  }
  take_registers<C::kMultiplyRegisters>();
  fill_table<!C::kScaleSums, T, 4 * C::kGroups>(C::table);
  if (weights.w[0].nested_absmax != nullptr && threadIdx.x < 256) {
    store_shared_word(C::map + 4 * threadIdx.x, __float_as_uint(__ldg(weights.w[0].nested_map + threadIdx.x)));
  }
  named_barrier(5, 128 * C::kGroups + 32 * kStrips);
  wait_for_kernel_before();
  multiply<T, C>(&map_y, p, warpgroup);
#endif
}

}  // namespace fastpeft::cuda::nf4_fragments
