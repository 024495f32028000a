// The tile kernel (nf4_linear_tiles_kernel.cuh) up to its multiplication: what it is told, where things lie in shared
// memory, and the warps that fetch and decode.
#pragma once

#include <cuda.h>

#include "common/nf4_checks.h"
#include "cuda/device/hopper.cuh"
#include "cuda/device/nf4_decode.cuh"
#include "cuda/device/numbers.cuh"
#include "cuda/device/ptx.cuh"
#include "cuda/nf4_linear_tiles_adapter.cuh"
#include "cuda/nf4_linear_tiles_experts.cuh"
#include "cuda/nf4_linear_tiles_plan.h"
#include "fastpeft/nf4_linear.h"

namespace fastpeft::cuda::nf4_tiles {

struct Problem {
  Plan plan;
  Experts experts;  // where the weight is several
  NF4View w;
  int n, k;           // of an expert
  int block_shift;    // log2 of the block size, less 6
  bool wide_scales;   // four steps' 8-bit scales of a row are one aligned word
  const void* bias;   // [out], may be null
  void* y;            // for the rows that TMA cannot store
  bool store_by_tma;  // out % 8 == 0
  bool add_to_y;      // by TMA
  uint8_t* workspace;
  unsigned* counters;  // zero, and left so
};

inline Problem make_problem(const NF4LinearArgs& args, const Plan& plan) {
  Problem p{};
  p.plan = plan;
  p.w = args.w;
  p.n = static_cast<int>(args.n), p.k = static_cast<int>(args.k);
  p.block_shift = log2_of(args.w.block_size / 64);
  p.bias = args.bias;
  p.y = args.y;
  p.store_by_tma = plan.out % 8 == 0 && is_aligned(args.y);
  p.add_to_y = args.add_to_y;
  p.workspace = static_cast<uint8_t*>(args.workspace);
  p.counters = args.counters;
  p.wide_scales = args.w.nested_absmax != nullptr && p.block_shift == 0 && p.k / 64 % 4 == 0 &&
                  reinterpret_cast<uintptr_t>(args.w.absmax) % 4 == 0;
  return p;
}

template <int kTokens_, int kCluster_, bool kAdapter_ = false, bool kExperts_ = false>
struct Config {
  static constexpr int kTokens = kTokens_, kCluster = kCluster_;
  static constexpr bool kAdapter = kAdapter_, kExperts = kExperts_;
  static constexpr bool kDrawsMeanwhile = kCluster > 1;  // the mask, during the multiplication; else: too few registers
  using AdapterOrNone = std::conditional_t<kAdapter, Adapter, NoAdapter>;
  static constexpr int kDecoders = kTokens == 256 ? 1 : kTokens == 128 ? 2 : 4;  // warpgroups
  static constexpr int kSpan = kCluster * kDecoders;  // steps from one of a decoder to its next
  static constexpr int kOwn = kChunkSteps / kSpan;    // steps of a decoder in a chunk
  // Beside the decoders, a warp that fetches. With 256 tokens it would leave too few registers to compile the
  // multiplication (ptxas 13.0 wants 154 at the kernel's entry), and a decoding warp fetches too.
  static constexpr bool kFetchWarp = kTokens < 256;
  static constexpr int kThreads = 128 * (kDecoders + kConsumers) + (kFetchWarp ? 32 : 0);
  static constexpr int kStages = kTokens == 32    ? 8
                                 : kTokens == 64  ? 7
                                 : kTokens == 128 ? (kCluster == 1 ? 5 : 6)
                                                  : (kCluster == 1 ? 3 : 4);
  static constexpr int kCodeChunks = kTokens == 128 && kCluster == 1 ? 3 : 2;  // a decoder's ring of codes, in chunks
  // Who makes the decoded tile visible to wgmma: the multiplying warps, unless the decoding ones must for the copy.
  static constexpr bool kReaderFences = kCluster == 1;
  static constexpr int kStoreTokens = kTokens < 64 ? kTokens : 64;  // of a store of y
  static constexpr uint32_t kXBytes = kTokens * kStep * 2, kWBytes = kTileOut * kStep * 2;
  static constexpr uint32_t kCodeBytes = kWBytes / 4, kCodeChunkBytes = kOwn * kCodeBytes;
  static constexpr uint32_t kStagingBytes = kStoreTokens * 128;  // of a multiplying warpgroup

  // Offsets in shared memory; tiles lie at multiples of 1024 bytes.
  static constexpr uint32_t w = 0, x = w + kStages * kWBytes, codes = x + kStages * kXBytes,
                            staging = codes + kDecoders * kCodeChunks * kCodeChunkBytes,
                            map = staging + kConsumers * kStagingBytes, full = map + 1024, empty = full + 8 * kStages,
                            codes_full = empty + 8 * kStages, codes_empty = codes_full + 8 * kDecoders * kCodeChunks,
                            xa_full = codes_empty + 8 * kDecoders * kCodeChunks, last = xa_full + 8 * kConsumers,
                            end = last + 16;
  static constexpr unsigned kBytes = end + 1024;                   // its beginning is moved to a multiple of 1024
  static_assert(kBytes <= kSmemBytes && kStages % kCluster == 0);  // a stage is always decoded by the same block
  static_assert(!kAdapter || kTokens * kPieceRank * 2 <= static_cast<int>(kStagingBytes));
  static_assert(!kAdapter || kTokens == kReadyTokens);
};

// Byte of a tile of 128-byte rows under the 128-byte swizzle.
__device__ inline uint32_t swizzled(uint32_t row, uint32_t byte) {
  return row * 128 + ((byte / 16 ^ row % 8) * 16) + byte % 16;
}

// A seat's chunks, items taken together.
struct ChunkWalk {
  int index, chunk, end;  // item; chunk of the depth, one past the item's last
  int out0, m0, w_row;
  bool more;
};
// Items are those of a Plan or of Experts.
template <typename Items>
__device__ inline void enter(const Items& items, int seat, ChunkWalk& c) {
  Item item;
  c.more = find_item(items, seat, c.index, item);
  c.chunk = item.first_chunk, c.end = item.first_chunk + item.chunks;
  c.out0 = item.out0, c.m0 = item.m0, c.w_row = item.w_row;
}
template <typename Items>
__device__ inline void advance(const Items& items, int seat, ChunkWalk& c) {
  if (++c.chunk < c.end || !c.more) return;
  ++c.index;
  enter(items, seat, c);
}
template <typename C>
__device__ inline const auto& items_of(const Problem& p) {
  if constexpr (C::kExperts) {
    return p.experts;
  } else {
    return p.plan;
  }
}

// --- decoding --------------------------------------------------------------------------------------------------------

// The scales of a lane's rows in a chunk. Double quantised: 8-bit codes, and nested scales; else the scales themselves.
template <int kOwn>
struct Scales {
  uint32_t code[kOwn];  // wide: four steps' codes in the first
  float scale[kOwn];
  bool inside[kOwn];
};

// Which rows and columns of W a lane decodes: its row of the tile is warp * 32 + lane. Forward that is a row of W.
// Backward a tile is 64 rows of W by two blocks of 64 columns, one below the other.
template <bool kBackward, typename C>
__device__ inline bool locate(const Problem& p, const ChunkWalk& c, int step, int warp, int lane, uint32_t& block) {
  const int blocks = p.k / 64;
  const int row = kBackward ? step * kStep + warp % 2 * 32 + lane : c.out0 + warp * 32 + lane;
  const int column = kBackward ? c.out0 / 64 + warp / 2 : step;
  const int w_row = C::kExperts ? c.w_row + row : row;
  block = static_cast<uint32_t>(w_row) * static_cast<uint32_t>(blocks) + static_cast<uint32_t>(column);
  return c.more && row < p.n && column < blocks;
}

template <bool kBackward, typename C>
__device__ inline void load_scales(const Problem& p, const ChunkWalk& c, int first, int warp, int lane,
                                   Scales<C::kOwn>& to) {
  uint32_t block;
#pragma unroll
  for (int o = 0; o < C::kOwn; ++o) {
    const bool inside = locate<kBackward, C>(p, c, c.chunk * kChunkSteps + first + C::kSpan * o, warp, lane, block);
    to.inside[o] = inside, to.code[o] = 0, to.scale[o] = 0.0f;
    if (!kBackward && p.wide_scales && o > 0) continue;
    if (!inside) continue;
    const uint32_t at = block >> p.block_shift;
    if (p.w.nested_absmax == nullptr) {
      to.scale[o] = __ldg(static_cast<const float*>(p.w.absmax) + at);
    } else {
      to.scale[o] = __ldg(p.w.nested_absmax + at / static_cast<uint32_t>(kNestedBlock));
      to.code[o] = !kBackward && p.wide_scales
                       ? __ldg(reinterpret_cast<const uint32_t*>(static_cast<const uint8_t*>(p.w.absmax) + (at & ~3u)))
                       : __ldg(static_cast<const uint8_t*>(p.w.absmax) + at);
    }
  }
}

// 64 weights into a row of a tile.
template <typename T>
__device__ inline void store_decoded(const uint4 (&codes)[2], float scale, uint32_t row_at, uint32_t row) {
  const LevelTable table = make_level_table<T>(scale);
  const uint32_t words[8] = {codes[0].x, codes[0].y, codes[0].z, codes[0].w,
                             codes[1].x, codes[1].y, codes[1].z, codes[1].w};
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    uint4 v;
    look_up(table, words[i], v.x, v.y);
    look_up(table, words[i] >> 16, v.z, v.w);
    store_shared(row_at + ((i ^ (row & 7)) << 4), v);
  }
}

// --- fetching --------------------------------------------------------------------------------------------------------

// x of one step; for one thread.
template <typename C>
__device__ inline void fetch_x(const CUtensorMap* map_x, uint32_t smem, const ChunkWalk& c, int step, int stage,
                               int rank) {
  const uint32_t full = smem + C::full + 8 * stage;
  barrier_arrive_expect(full, C::kXBytes + (stage % C::kCluster == rank ? 0 : C::kWBytes));
  tma_load(smem + C::x + stage * C::kXBytes, map_x, full, (c.chunk * kChunkSteps + step) * kStep,
           c.m0 + rank * C::kTokens);
}

// The codes of a decoder's steps in a chunk; for one thread.
template <bool kBackward, typename C>
__device__ inline void fetch_codes(const CUtensorMap* map_w, uint32_t smem, const ChunkWalk& c, int group, int slot,
                                   int rank) {
  const int place = group * C::kCodeChunks + slot;
  const uint32_t full = smem + C::codes_full + 8 * place;
  barrier_arrive_expect(full, C::kCodeChunkBytes);
#pragma unroll
  for (int o = 0; o < C::kOwn; ++o) {
    const int step = c.chunk * kChunkSteps + C::kCluster * group + rank + C::kSpan * o;
    const uint32_t to = smem + C::codes + place * C::kCodeChunkBytes + o * C::kCodeBytes;
    const int w_row = C::kExperts ? c.w_row : 0;
    kBackward ? tma_load(to, map_w, full, c.out0 / 2, w_row + step * kStep)
              : tma_load(to, map_w, full, step * (kStep / 2), w_row + c.out0);
  }
}

// One thread, when it has a warp of its own.
template <bool kBackward, typename C>
__device__ void fetch(const CUtensorMap* map_x, const CUtensorMap* map_w, const Problem& p, uint32_t smem, int rank) {
  const int seat = blockIdx.x / C::kCluster;
  const auto& items = items_of<C>(p);
  ChunkWalk here{};
  enter(items, seat, here);
  ChunkWalk coming = here;  // the first chunk whose codes are not under way
  Ring stage{0, 1}, slot{0, 1};
  const auto codes = [&] {
    for (int group = 0; group < C::kDecoders; ++group) {
      barrier_wait(smem + C::codes_empty + 8 * (group * C::kCodeChunks + slot.at), slot.parity);
      fetch_codes<kBackward, C>(map_w, smem, coming, group, slot.at, rank);
    }
    slot.advance<C::kCodeChunks>();
    advance(items, seat, coming);
  };
  for (int i = 1; i < C::kCodeChunks && coming.more; ++i) codes();
  if constexpr (!C::kAdapter) wait_for_kernel_before();
  for (; here.more; advance(items, seat, here)) {
    if (coming.more) codes();
    for (int step = 0; step < kChunkSteps; ++step) {
      barrier_wait(smem + C::empty + 8 * stage.at, stage.parity);
      fetch_x<C>(map_x, smem, here, step, stage.at, rank);
      stage.advance<C::kStages>();
    }
  }
}

// One warpgroup. Step i belongs to thread block i % kCluster of the cluster, which decodes it for all of them.
template <typename T, bool kBackward, typename C>
__device__ void decode(const CUtensorMap* map_x, const CUtensorMap* map_w, const Problem& p, uint32_t smem,
                       const float* map, int group, int rank) {
  constexpr int kOwn = C::kOwn;
  const int warp = __shfl_sync(0xffffffff, threadIdx.x / 32 % 4, 0), lane = threadIdx.x % 32;
  const int seat = blockIdx.x / C::kCluster, first = C::kCluster * group + rank;
  const auto& items = items_of<C>(p);
  const bool nested = p.w.nested_absmax != nullptr, fetches = !C::kFetchWarp && warp == 0;
  const float offset = nested ? __ldg(p.w.offset) : 0.0f;
  const uint32_t row = warp * 32 + lane;
  // This lane's codes under TMA's swizzle of 32 or 64 bytes: two pieces of 16 bytes.
  const uint32_t code_row = kBackward ? row % 64 : row;
  const uint32_t code_at = kBackward ? code_row * 64 + ((row / 64 * 2 ^ (code_row / 2 & 3)) << 4)
                                     : code_row * 32 + ((code_row / 4 & 1) << 4);
  const uint32_t ring = smem + C::codes + group * C::kCodeChunks * C::kCodeChunkBytes + code_at;
  const uint32_t codes_full = smem + C::codes_full + 8 * group * C::kCodeChunks;
  const uint32_t codes_empty = smem + C::codes_empty + 8 * group * C::kCodeChunks;

  ChunkWalk here{};
  enter(items, seat, here);
  ChunkWalk next = here, coming = here;  // coming: as in fetch(), only where this warp fetches
  if (fetches) {
    for (int slot = 0; slot < C::kCodeChunks && coming.more; ++slot) {
      if (lane == 0) fetch_codes<kBackward, C>(map_w, smem, coming, group, slot, rank);
      advance(items, seat, coming);
    }
  }
  Scales<kOwn> scales;
  load_scales<kBackward, C>(p, next, first, warp, lane, scales);
  if (!C::kAdapter && fetches) wait_for_kernel_before();

  const bool wide = !kBackward && p.wide_scales;
  Ring slot{0, 0}, refill{0, 0}, stage{C::kCluster * group, 1};  // stage: of the span's first step
  bool begun = false;
  while (here.more) {
    barrier_wait(codes_full + 8 * slot.at, slot.parity);
    uint4 codes[kOwn][2];
    float scale[kOwn];
#pragma unroll
    for (int o = 0; o < kOwn; ++o) {
      const uint32_t from = ring + slot.at * C::kCodeChunkBytes + o * C::kCodeBytes;
      codes[o][0] = load_shared(from), codes[o][1] = load_shared(from ^ 16);
      scale[o] = wide ? scales.scale[0] : scales.scale[o];
      if (nested) {
        const uint32_t code = wide ? scales.code[0] >> (8 * (first + C::kSpan * o)) & 255 : scales.code[o];
        scale[o] = __fadd_rn(mul_ftz(map[code], scale[o]), offset);
      }
      if (!scales.inside[o]) scale[o] = 0.0f;
    }
    advance(items, seat, next);
    load_scales<kBackward, C>(p, next, first, warp, lane, scales);
#pragma unroll
    for (int o = 0; o < kOwn; ++o) {
      const int span = C::kStages == kChunkSteps ? C::kCluster * group + C::kSpan * o : stage.at;
      const auto fetch_own = [&](int which) {
        barrier_wait(smem + C::empty + 8 * (span + which), stage.parity);
        if (lane == 0) fetch_x<C>(map_x, smem, here, C::kCluster * group + C::kSpan * o + which, span + which, rank);
      };
      if (fetches) {
        fetch_own(0);
        if (rank > 0) fetch_own(1);
      }
      const int mine = span + rank;
      const uint32_t full = smem + C::full + 8 * mine, tile = smem + C::w + mine * C::kWBytes;
      if (!fetches) barrier_wait(smem + C::empty + 8 * mine, stage.parity);
      store_decoded<T>(codes[o], scale[o], tile + row * 128, row);
      if constexpr (!C::kReaderFences) fence_async_shared();
      __syncwarp();
      if (lane == 0) {
        barrier_arrive(full);
        if constexpr (C::kCluster > 1) {
          const uint32_t rows = tile + warp * (32 * 128);
          copy_to_remote(shared_of(rank ^ 1, rows), rows, 32 * 128, shared_of(rank ^ 1, full));
        }
      }
      if (fetches) {
        if (C::kCluster > 1 && rank == 0) fetch_own(1);
        if (o == 0 && begun && coming.more) {  // the slot of the chunk before, which the other warps have left by now
          barrier_wait(codes_empty + 8 * refill.at, refill.parity);
          if (lane == 0) fetch_codes<kBackward, C>(map_w, smem, coming, group, refill.at, rank);
          advance(items, seat, coming);
          refill.advance<C::kCodeChunks>();
        }
      }
      if (C::kStages != kChunkSteps) stage.advance<C::kStages>(C::kSpan);
    }
    if (C::kStages == kChunkSteps) stage.parity ^= 1;
    begun = true;
    __syncwarp();
    if (lane == 0) barrier_arrive(codes_empty + 8 * slot.at);
    slot.advance<C::kCodeChunks>();
    advance(items, seat, here);
  }
}

}  // namespace fastpeft::cuda::nf4_tiles
