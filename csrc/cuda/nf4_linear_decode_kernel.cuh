// NF4 product for few tokens, the decoding regime: y[m,n] = x[m,k] @ W[n,k]^T (+ bias), m <= 16.
//
// Layout   codes  uint8[n, k/2], high nibble = even k; k % 64 == 0 and blocks of 64 or more, so that 64 k share a scale
//          x      T[m, k], y T[m, n], row-major; codes and x 16-byte aligned
// Plan     The weight is read once by cp.async into a ring of 2 KB items a warp: 16 rows by 256 k, or 32 rows by 128 k
//          for more than 8 tokens, whose x would fill the registers. W rows are the 16-row side of mma.m16n8k16, tokens
//          its 8-wide side: one to eight cost the same. The order of a contraction is free: lane t of a quad takes the
//          16 consecutive k (8 bytes) at 16t of a 64-k half, and reads x at the same places, so nothing is shuffled or
//          repacked. A byte becomes a pair of levels by one look-up in a table of 256 pairs, of which every lane has a
//          copy in its own bank, and whose lines of 256 bytes make a byte's address one byte permutation. The scale is
//          applied in float32 to the sum over a half.
//          The warps of a thread block share its rows and divide k; their sums meet in shared memory, in a fixed order.
//          x stays in registers for a group of units of 16 rows. The load/store unit is the scarce one (bench/LOG.md):
//          every row that a load touches costs it a cycle. The 8-bit scales of a group's rows are one run of memory, so
//          they are copied into shared memory whole, a group ahead (ScaleSource::kStaged); where they do not fit or are
//          not of this form, each lane loads two of an item.
//          A launch starts while the kernel before ends, and fills its table meanwhile.
// Numerics levels rounded to T, scales and sums in float32, one rounding to T: as near to the exact product as decoding
//          to T and multiplying.
// Source   fragment layout: PTX ISA, 'Matrix Fragments for mma.m16n8k16'; pair table: FLUTE (arXiv 2407.10960).
#pragma once

#include "common/integer.h"
#include "common/nf4_checks.h"
#include "common/nf4_levels.h"
#include "cuda/device/numbers.cuh"
#include "cuda/device/ptx.cuh"
#include "cuda/nf4_linear_config.h"
#include "fastpeft/nf4.h"

namespace fastpeft::cuda {

struct NF4DecodeProblem {
  NF4View w;
  const void* x;
  const void* bias;  // may be null
  void* y;
  int m, n, k;
  int block_shift;  // log2 of the block size

  // From the plan: what does not change stays out of registers.
  int block_units, blocks_with_one_more;  // units of a thread block
  int group_rows;                         // of a group
  int row_halves;                         // of 64 k in a row
  int row_words, warp_words;              // of partial sums: a token's, a warp's
  int staged_codes;                       // bytes of a group's staged 8-bit scales; the nested ones follow
  int staged_first, staged_both;          // in shared memory: the first of two buffers, and the sum of both places
  int y_pitch;                            // elements from one token of y to the next
  bool add_to_y;
};

inline NF4DecodeProblem nf4_decode_problem(const NF4View& w, const void* x, const void* bias, void* y, int m, int n,
                                           int k, int blocks, int y_pitch, const nf4_decode::Plan& plan) {
  NF4DecodeProblem p{};
  p.w = w, p.x = x, p.bias = bias, p.y = y, p.m = m, p.n = n, p.k = k, p.y_pitch = y_pitch;
  p.block_shift = log2_of(w.block_size);
  const int units = static_cast<int>(ceil_div(n, nf4_decode::kUnit));
  p.block_units = units / blocks, p.blocks_with_one_more = units % blocks;
  p.group_rows = nf4_decode::kUnit * plan.group_units;
  p.row_halves = k / 64;
  p.row_words = nf4_decode::row_stride(plan.group_units), p.warp_words = m * p.row_words;
  if (plan.staged) {
    p.staged_codes = nf4_decode::staged_codes_bytes(k, plan.group_units);
    p.staged_first = static_cast<int>(nf4_decode::smem_bytes(m, plan.warps, plan.group_units));
    p.staged_both = 2 * p.staged_first + nf4_decode::staged_bytes(k, plan.group_units);
  }
  return p;
}

// The weights that a launch multiplies by; a thread block has one of them.
template <int kCount>
struct NF4DecodeProblems {
  NF4DecodeProblem each[kCount];
  int first_block[kCount];
};

namespace nf4_decode {

constexpr int kLaneK = 16;                        // consecutive k of a lane in a half
constexpr uint32_t kNestedHalves = kNestedBlock;  // halves of a nested scale, where each has a scale of its own

// What an item is for a number of token tiles. Its 16 lines of 128 bytes are four quarters of 16 rows by 64 k: the
// halves of one unit, or two halves of two units.
template <int kTiles>
struct Item {
  static constexpr int kUnits = kTiles;
  static constexpr int kRows = kUnit * kUnits;
  static constexpr int kHalves = 4 / kUnits;
  static constexpr int kK = 64 * kHalves;
};

// Where the scales are read from. kStaged: 8-bit scales of blocks of 64, copied into shared memory a group ahead.
enum class ScaleSource { kFloat, kNested, kStaged };

// A lane's two scales of an item, for quarters 2s and 2s + 1 of row r, where s = lane / 16 and r = lane % 16.
struct Scales {
  uint32_t codes;  // 8 bits each, when double quantised
  float scale[2];  // the nested scales then, else the scales themselves
};

// A product of sizes in one multiply: 32 bits by 32 to 64.
__device__ inline int64_t wide(int a, int b) {
  return static_cast<int64_t>(static_cast<uint64_t>(static_cast<uint32_t>(a)) * static_cast<uint32_t>(b));
}

// Starts the copy of this lane's part of an item, 16 bytes of every fourth line; `rows` are there from its first on.
// `from` counts 16 bytes from the weight's first, so that it takes one register.
__device__ inline void copy_codes(uint32_t to, const uint8_t* codes, uint32_t from, int row_halves, int rows) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (4 * i < rows) copy_async_16(to + 4 * i * kLineBytes, codes + wide(16, from + 8 * i * row_halves));
  }
}

// Scales of two halves, 64 k each, counted from the weight's first element: `half` and, if it is wanted too, the next.
// `paired` says that each has an 8-bit scale of its own, the first at an even address.
template <bool kNested>
__device__ inline Scales load_scales(const NF4View& w, uint32_t half, bool both, bool paired, int half_shift) {
  Scales scales;
  const uint32_t first = half >> half_shift, second = (half + both) >> half_shift;
  if constexpr (kNested) {
    const auto* codes = static_cast<const uint8_t*>(w.absmax);
    scales.scale[0] = __ldg(w.nested_absmax + first / static_cast<uint32_t>(kNestedBlock));
    if (paired) {
      scales.codes = __ldg(reinterpret_cast<const uint16_t*>(codes + first));
      scales.scale[1] = scales.scale[0];
    } else {
      scales.codes = __ldg(codes + first) | static_cast<uint32_t>(__ldg(codes + second)) << 8;
      scales.scale[1] = __ldg(w.nested_absmax + second / static_cast<uint32_t>(kNestedBlock));
    }
  } else {
    scales.codes = 0;
    scales.scale[0] = __ldg(static_cast<const float*>(w.absmax) + first);
    scales.scale[1] = __ldg(static_cast<const float*>(w.absmax) + second);
  }
  return scales;
}

// Where byte `i` of staged scales lies. Rows a multiple of 32 bytes apart, which are read together, would meet in the
// same banks; so the 16-byte parts of a line of 128 bytes change places with its number.
__device__ inline uint32_t staged_at(uint32_t i) { return i ^ (i >> 3 & 0x70); }

// A thread's place in its block, read anew: what is derived from it then sits in no register between two uses.
struct Place {
  int lane, warp, g, t;
  __device__ Place() {
    int thread;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    lane = thread % 32, warp = thread / 32, g = lane / 4, t = lane % 4;
  }
};

__device__ inline int block_of_grid() {
  int block;
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(block));
  return block;
}

// x of one half for this lane: 16 consecutive values of token g of a tile; zeros where there is no token or no k.
template <typename T>
__device__ inline void load_x(uint4 (&to)[2], const T* from, bool there) {
  to[0] = to[1] = uint4{};
  if (there) {
    to[0] = load_16(from);
    to[1] = load_16(from + 8);
  }
}

__device__ inline uint32_t word(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

// Levels of byte `i` of eight as a pair: the byte picks the line, `lane_offset` < 128 is the lane's bank.
template <int i>
__device__ inline uint32_t look_up(const char* table, const uint2& bytes, uint32_t lane_offset) {
  const uint32_t offset = __byte_perm(i < 4 ? bytes.x : bytes.y, lane_offset, 0x5504 | (i % 4) << 4);
  return *reinterpret_cast<const uint32_t*>(table + offset);
}

// sum += 16 rows by the 16 k of quarter j: bytes 2j and 2j + 1 of every lane.
template <typename T, int kTiles, int j>
__device__ inline void multiply_16(float (&sum)[kTiles][4], const uint2& low, const uint2& high,
                                   const uint4 (&x)[kTiles][2], const char* table, uint32_t lane_offset) {
  const uint32_t a[4] = {look_up<2 * j>(table, low, lane_offset), look_up<2 * j>(table, high, lane_offset),
                         look_up<2 * j + 1>(table, low, lane_offset), look_up<2 * j + 1>(table, high, lane_offset)};
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    const uint4& eight = x[tile][j / 2];
    mma_m16n8k16<T>(sum[tile], a, word(eight, j % 2 * 2), word(eight, j % 2 * 2 + 1));
  }
}

// sum = 16 rows by 64 k: `low` and `high` are this lane's bytes of rows g and g + 8.
template <typename T, int kTiles>
__device__ inline void multiply_64(float (&sum)[kTiles][4], const uint2& low, const uint2& high,
                                   const uint4 (&x)[kTiles][2], const char* table, uint32_t lane_offset) {
  multiply_16<T, kTiles, 0>(sum, low, high, x, table, lane_offset);
  multiply_16<T, kTiles, 1>(sum, low, high, x, table, lane_offset);
  multiply_16<T, kTiles, 2>(sum, low, high, x, table, lane_offset);
  multiply_16<T, kTiles, 3>(sum, low, high, x, table, lane_offset);
}

template <int kTiles>
__device__ inline void add_scaled(float (&acc)[kTiles][4], float low, float high, const float (&sum)[kTiles][4]) {
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    acc[tile][0] = fmaf(low, sum[tile][0], acc[tile][0]);
    acc[tile][1] = fmaf(low, sum[tile][1], acc[tile][1]);
    acc[tile][2] = fmaf(high, sum[tile][2], acc[tile][2]);
    acc[tile][3] = fmaf(high, sum[tile][3], acc[tile][3]);
  }
}

// One or two neighbours store the copies of an entry, 16 bytes at a time, in an order that differs from entry to entry:
// else all threads would store to the same banks.
template <typename T, int kThreads>
__device__ inline void fill_table(char* table) {
  constexpr int kShare = kThreads / 256, kEach = 8 / kShare;
  const int byte = threadIdx.x / kShare, part = threadIdx.x % kShare;
  const uint32_t pair = pack_pair<T>(nf4_level(byte >> 4), nf4_level(byte & 15));
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int chunk = part * kEach + (i + byte) % kEach;
    *reinterpret_cast<uint4*>(table + byte * kLineBytes + chunk * 16) = uint4{pair, pair, pair, pair};
  }
}

// --- kernel ----------------------------------------------------------------------------------------------------------

template <typename T, int kTiles, ScaleSource kScales, int kWarps, int kCount>
__global__ void __launch_bounds__(32 * kWarps, 1) kernel(const __grid_constant__ NF4DecodeProblems<kCount> problems) {
  int which = 0;
#pragma unroll
  for (int i = 1; i < kCount; ++i) which += static_cast<int>(blockIdx.x) >= problems.first_block[i];
  const NF4DecodeProblem& p = problems.each[which];
  const auto this_block = [&] { return kCount == 1 ? block_of_grid() : block_of_grid() - problems.first_block[which]; };
  using Item = Item<kTiles>;
  constexpr int kThreads = 32 * kWarps;
  constexpr bool kNested = kScales != ScaleSource::kFloat, kStaged = kScales == ScaleSource::kStaged;
  constexpr int kRound = kWarps * Item::kK;  // k that the warps take side by side
  extern __shared__ __align__(128) char smem[];
  char* table = smem;
  float* nested_map = reinterpret_cast<float*>(smem + ring_end(kWarps));
  float* partial = nested_map + 256;  // sums of a warp: [warp][token][row of the group]
  const int lane = threadIdx.x % 32;
  uint32_t lane_offset = 4 * lane;
  asm("" : "+r"(lane_offset));  // or the compiler derives it again for every look-up, for one instruction more

  // Rows of a block, and where those of a group end.
  const auto begin_of = [&](int block) { return (p.block_units * block + min(block, p.blocks_with_one_more)) * kUnit; };
  const auto end_of_group = [&](int group) { return min(group + p.group_rows, begin_of(this_block() + 1)); };
  const int row_begin = begin_of(this_block());
  // The last round is divided evenly too, in steps that keep two scales together where k allows it.
  const int step_shift = kStaged || p.k % 128 == 0 ? 7 : 6;
  const auto slice = [&](int round) {
    const int steps = (p.k - round + (kWarps << step_shift) - 1) >> step_shift;
    return min(Item::kK, steps / kWarps << step_shift);
  };
  const int half_shift = p.block_shift - 6;
  const bool paired = kNested && step_shift == 7 && half_shift == 0 && reinterpret_cast<uintptr_t>(p.w.absmax) % 2 == 0;

  // Offsets of this warp's ring, the slot in use first. Lane (r, s) = (lane / 8, lane % 8) copies chunk s of line r and
  // of every fourth from there. In a line the quarters change places with its number, so that lines g to g + 3, which
  // are read together, do not meet in the same banks.
  uint32_t ring[kStages];
#pragma unroll
  for (int i = 0; i < kStages; ++i) ring[i] = item_offset(i * kWarps + static_cast<int>(threadIdx.x) / 32 % kWarps);
  const int copy_line = lane / 8, copy_chunk = lane % 8;
  const auto copy_row = [](const Place& at) { return at.lane / 8 + (Item::kUnits == 2 ? at.lane / 4 % 2 * kUnit : 0); };
  const auto copy_byte = [](const Place& at) { return at.lane % (Item::kUnits == 2 ? 4 : 8) * 16; };
  const uint32_t copy_to =
      smem_address(smem) + copy_line * kLineBytes + ((copy_chunk / 2 ^ copy_line) * 2 + copy_chunk % 2) * 16;
  const auto scale_row = [](const Place& at) { return Item::kUnits == 2 ? at.lane : at.lane % 16; };
  const auto scale_k = [](const Place& at) { return Item::kUnits == 2 ? 0 : at.lane / 16 * 128; };

  // Starts the copy of the scales of the group at `group` into one of two buffers, by all threads. A group begins at a
  // multiple of 16 rows and k is one of 64: its run of bytes begins at a multiple of 16.
  int staged_here = p.staged_first;
  const auto stage = [&](int group, uint32_t to) {
    to += smem_address(smem);
    const uint32_t first = static_cast<uint32_t>(group) * p.row_halves;
    const uint32_t count = static_cast<uint32_t>(min(end_of_group(group), p.n) - group) * p.row_halves;
    const auto* codes = static_cast<const uint8_t*>(p.w.absmax) + first;
#pragma unroll 1
    for (uint32_t i = 16 * threadIdx.x; i < count; i += 16 * kThreads) {
      copy_async_16(to + staged_at(i), codes + i, min(16u, count - i));
    }
    const float* nested = p.w.nested_absmax + first / kNestedHalves;
    const uint32_t more = (first % kNestedHalves + count - 1) / kNestedHalves;  // beyond the first
#pragma unroll 1
    for (uint32_t i = kThreads - 1 - threadIdx.x; i <= more; i += kThreads) {
      copy_async_4(to + p.staged_codes + 4 * i, nested + i);
    }
  };
  // The table is filled while the kernel before ends, else while the first copies are under way.
  if constexpr (kLaunchesOverlap) {
    let_next_kernel_start();
    fill_table<T, kThreads>(table);
  }
  if constexpr (kStaged) stage(row_begin, staged_here);
  if constexpr (kNested) {
    static_assert(kThreads >= 256);
    if (threadIdx.x < 256) copy_async_4(smem_address(nested_map + threadIdx.x), p.w.nested_map + threadIdx.x);
    commit_async();
  }

  // Items in the order of their use: rows of a group for this warp's k of a round, then the next round, then the next
  // group.
  int ahead_group = row_begin, ahead_round = 0;
  const uint32_t halves = static_cast<uint32_t>(p.w.numel / 64);
  uint32_t ahead_codes;         // what this lane copies, in 16 bytes
  uint32_t ahead_scale;         // half whose scale this lane loads
  int ahead_rows, ahead_items;  // left of this lane's rows, and of the items of a round
  const auto begin_rows = [&] {
    const Place at;
    const int width = slice(ahead_round), k = ahead_round + at.warp * width, k_end = min(p.k, k + width);
    ahead_codes = static_cast<uint32_t>(ahead_group + copy_row(at)) * (2 * p.row_halves) + (k / 2 + copy_byte(at)) / 16;
    ahead_scale =
        static_cast<uint32_t>(ahead_group + scale_row(at)) * p.row_halves + static_cast<uint32_t>(k + scale_k(at)) / 64;
    const int rows = end_of_group(ahead_group) - ahead_group;  // none after the last
    ahead_items = rows > 0 ? (rows + Item::kRows - 1) / Item::kRows : INT32_MAX;
    ahead_rows = k + 2 * copy_byte(at) < k_end ? min(rows, p.n - ahead_group) - copy_row(at) : 0;
  };
  const auto both_scales = [&] {
    const Place at;
    const int width = slice(ahead_round), k = ahead_round + at.warp * width;
    return k + scale_k(at) + 64 < min(p.k, k + width);
  };
  begin_rows();
  Scales scales[kStages - 1];
  const auto fetch = [&](uint32_t to, Scales& scales_to) {
    copy_codes(copy_to + to, p.w.codes, ahead_codes, p.row_halves, ahead_rows);
    commit_async();
    if (!kStaged && ahead_scale < halves) {
      scales_to = load_scales<kNested>(p.w, ahead_scale, paired || both_scales(), paired, half_shift);
    }
    ahead_rows -= Item::kRows;
    ahead_codes += 2 * Item::kRows * p.row_halves;
    ahead_scale += p.row_halves * Item::kRows;
    if (--ahead_items == 0) {
      ahead_round += kRound;
      if (ahead_round >= p.k) {
        ahead_round = 0;
        ahead_group += p.group_rows;
      }
      begin_rows();
    }
  };
  uint4 x[Item::kHalves][kTiles][2];
  const auto load_round = [&](int round) {
    const Place at;
    const int width = slice(round), k = round + at.warp * width, here = min(p.k - k, width) - kLaneK * at.t;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const T* from = static_cast<const T*>(p.x) + wide(8 * tile + at.g, p.k) + (k + kLaneK * at.t);
#pragma unroll
      for (int half = 0; half < Item::kHalves; ++half) {
        load_x(x[half][tile], from + 64 * half, 8 * tile + at.g < p.m && 64 * half < here);
      }
    }
  };
  float offset = 0.0f;
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) fetch(ring[i], scales[i]);
  if constexpr (kNested) offset = load_4(p.w.offset);
  wait_for_kernel_before();  // so far only the weight was read
  load_round(0);
  if constexpr (!kLaunchesOverlap) fill_table<T, kThreads>(table);
  if constexpr (kNested) wait_async<kStages - 1>();  // all but the first items
  __syncthreads();
  const auto decode = [&](float(&to)[2], const Scales& from) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      to[i] = from.scale[i];
      if constexpr (kNested) to[i] = __fadd_rn(mul_ftz(nested_map[from.codes >> 8 * i & 255], to[i]), offset);
    }
  };

  const int row_end = begin_of(this_block() + 1);
  for (int group = row_begin; group < row_end; group += p.group_rows) {
    const int group_end = min(group + p.group_rows, row_end);
    if constexpr (kStaged) {
      if (group_end < row_end) stage(group_end, p.staged_both - staged_here);  // arrives with the next item fetched
    }
    // Sums of the unit or units at hand first: they change places after an item, so that one piece of code serves all.
    float acc[kMostGroupUnits][kTiles][4] = {};
    for (int round = 0; round < p.k; round += kRound) {
      if (p.k > kRound && (round > 0 || group != begin_of(this_block()))) load_round(round);
      const Place at;
      const int width = slice(round), k = round + at.warp * width;
      const int here = min(p.k - k, width);  // k of this warp, if positive
      uint32_t scale_at = scale_row(at) * p.row_halves + static_cast<uint32_t>(k + scale_k(at)) / 64;
#pragma unroll 1
      for (int row = group; row < group + kMostGroupUnits * kUnit; row += Item::kRows) {
        if (row < group_end) {
          float scale[2];
          if constexpr (kStaged) {
            const char* staged = smem + staged_here;
            uint32_t first = group;
            asm volatile("" : "+r"(first));  // or what is derived from it sits in a register
            first = first * p.row_halves % kNestedHalves;
            const float nested =
                reinterpret_cast<const float*>(staged + p.staged_codes)[(first + scale_at) / kNestedHalves];
            decode(scale, {*reinterpret_cast<const uint16_t*>(staged + staged_at(scale_at)), {nested, nested}});
            scale_at += Item::kRows * p.row_halves;
          }
          wait_async<kStages - 2>();
          __syncwarp();  // all lanes' copies have arrived, and all lanes are done with the slot that is filled next
          if constexpr (!kStaged) {
            decode(scale, scales[0]);
#pragma unroll
            for (int i = 0; i + 1 < kStages - 1; ++i) scales[i] = scales[i + 1];
          }
          const uint32_t slot = ring[0];
          fetch(ring[kStages - 1], scales[kStages - 2]);
#pragma unroll
          for (int i = 0; i + 1 < kStages; ++i) ring[i] = ring[i + 1];
          ring[kStages - 1] = slot;

          uint32_t at = lane_offset;
          asm volatile("" : "+r"(at));      // or what is derived from it sits in registers
          const uint32_t source = at / 16;  // g
          const uint32_t from = slot + source * kLineBytes + source % 4 * 32 + at % 16 * 2;  // quarter 0 of this lane
#pragma unroll
          for (int s = 0; s < 2; ++s) {
            if (Item::kUnits == 2 ? here <= 0 || row + s * kUnit >= group_end : here <= 128 * s) break;
#pragma unroll
            for (int q = 0; q < 2; ++q) {
              // Keeps the assembler from loading the next quarter's codes early, for which there are no registers.
              if (kStaged && kTiles == 2 && q == 1) __syncwarp();
              float sum[kTiles][4] = {};
              const char* quarter = smem + (from ^ (2 * s + q) * 32);
              multiply_64<T>(sum, *reinterpret_cast<const uint2*>(quarter),
                             *reinterpret_cast<const uint2*>(quarter + 8 * kLineBytes),
                             x[Item::kUnits == 2 ? q : 2 * s + q], table, lane_offset);
              const float low = __shfl_sync(0xffffffff, scale[q], source + 16 * s);
              const float high = __shfl_sync(0xffffffff, scale[q], source + 16 * s + 8);
              add_scaled<kTiles>(acc[Item::kUnits == 2 ? s : 0], low, high, sum);
            }
          }
        }
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            float first[Item::kUnits];
#pragma unroll
            for (int u = 0; u < Item::kUnits; ++u) first[u] = acc[u][tile][i];
#pragma unroll
            for (int u = 0; u + Item::kUnits < kMostGroupUnits; ++u) acc[u][tile][i] = acc[u + Item::kUnits][tile][i];
#pragma unroll
            for (int u = 0; u < Item::kUnits; ++u) {
              acc[kMostGroupUnits - Item::kUnits + u][tile][i] = first[u];
            }
          }
        }
      }
    }

    if (group != begin_of(this_block())) __syncthreads();  // the sums of the group before have been read
    int row_words = p.row_words;
    asm volatile("" : "+r"(row_words));  // or its multiples sit in registers all through the loop
    const Place at;
    float* mine = partial + at.warp * p.warp_words + at.g;
#pragma unroll
    for (int unit = 0; unit < kMostGroupUnits; ++unit) {
      if (unit * kUnit >= p.group_rows) break;
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int token = 8 * tile + 2 * at.t + i % 2;
          if (token < p.m) mine[token * row_words + kUnit * unit + i / 2 * 8] = acc[unit][tile][i];
        }
      }
    }
    if constexpr (kStaged) {  // the next group's have arrived: they came with the first of this one's items fetched
      const int items = ((p.k - 1) / kRound + 1) * (p.group_rows / Item::kRows);
      if (items < kStages) items == 1 ? wait_async<0>() : wait_async<1>();
      static_assert(kStages == 3);
    }
    __syncthreads();
    const int group_shift = p.group_rows == 64 ? 6 : 5;
    for (int i = threadIdx.x; i < p.m << group_shift; i += kThreads) {
      const int r = i & (p.group_rows - 1), token = i >> group_shift;
      if (group + r >= min(group_end, p.n)) continue;
      const float* from = partial + token * p.row_words + r;
      float sum = 0.0f;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) sum += from[w * p.warp_words];
      if (p.bias != nullptr) sum += to_float(static_cast<const T*>(p.bias)[group + r]);
      T* y = static_cast<T*>(p.y) + static_cast<int64_t>(token) * (kCount == 1 ? p.n : p.y_pitch) + group + r;
      if (kCount == 1 && kStaged && p.add_to_y) sum = to_float(*y) + to_float(from_float<T>(sum));
      *y = from_float<T>(sum);
    }
    staged_here = p.staged_both - staged_here;
  }
}

}  // namespace nf4_decode
}  // namespace fastpeft::cuda
