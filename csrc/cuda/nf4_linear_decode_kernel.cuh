// NF4 product for few tokens, the decoding regime: y[m,n] = x[m,k] @ W[n,k]^T (+ bias), m <= 16.
//
// Layout   codes  uint8[n, k/2], high nibble = even k; k % 64 == 0 and blocks of 64 or more, so that 64 k share a scale
//          x      T[m, k], y T[m, n], row-major; codes and x 16-byte aligned
// Plan     The weight is read once, in its own order, by cp.async into a ring of items a warp; an item is 32 rows by
//          128 k. W rows are the 16-row side of mma.m16n8k16, tokens its 8-wide side: one to eight cost the same. The
//          order of a contraction is free: lane t of a quad takes the 16 consecutive k (8 bytes) at 16t of a 64-k half,
//          and reads x at the same places, so nothing is shuffled or repacked. A byte becomes a pair of levels by one
//          look-up in a table of 256 pairs, of which every lane has a copy in its own bank. The scale is applied in
//          float32 to the sum over a half.
//          The warps of a thread block share its rows and divide k; their sums meet in shared memory, in a fixed order.
//          Thread blocks take contiguous runs of 16-row units, so that x comes from L1 after the first.
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
};

namespace nf4_decode {

constexpr int kLaneK = 16;  // consecutive k of a lane in a half

// Scales of an item's rows: a lane has those of row g + 8t, for both halves.
struct Scales {
  uint32_t code[2];  // 8-bit scale, when double quantised
  float scale[2];    // its nested scale then, else the scale itself
};

// A product of sizes in one multiply: 32 bits by 32 to 64.
__device__ inline int64_t wide(int a, int b) {
  return static_cast<int64_t>(static_cast<uint64_t>(static_cast<uint32_t>(a)) * static_cast<uint32_t>(b));
}

// Starts the copy of an item's codes: `from` is where this lane's 16 bytes of its first row lie. Of a row, the two
// 32-byte halves change places in every second pair of rows: else rows g and g + 2 would be read from the same banks.
__device__ inline void copy_codes(char* to, const uint8_t* from, int row_bytes, int rows, bool in_k, int lane) {
#pragma unroll
  for (int i = 0; i < kItemBytes / 16 / 32; ++i) {
    const int r = 8 * i + lane / 4, part = lane % 4;
    if (r < rows && in_k) {
      copy_async_16(to + r * kRowBytes + ((part ^ (r & 2)) * 16), from + wide(8 * i, row_bytes));
    }
  }
}

template <bool kNested>
__device__ inline Scales load_scales(const NF4View& w, int64_t first, bool whole, int block_shift) {
  Scales scales{};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint32_t block = static_cast<uint32_t>((first + (whole ? 64 * half : 0)) >> block_shift);
    if constexpr (kNested) {
      scales.code[half] = __ldg(static_cast<const uint8_t*>(w.absmax) + block);
      scales.scale[half] = __ldg(w.nested_absmax + block / static_cast<uint32_t>(kNestedBlock));
    } else {
      scales.scale[half] = __ldg(static_cast<const float*>(w.absmax) + block);
    }
  }
  return scales;
}

// x of one half for this lane: 16 consecutive values of token g of each tile; zeros where there is no token or no k.
// `x` is null for a token that is not there.
template <typename T, int kTiles>
__device__ inline void load_x(uint4 (&to)[kTiles][2], const T* const (&x)[kTiles], int k, bool in_k) {
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    to[tile][0] = to[tile][1] = uint4{};
    if (x[tile] != nullptr && in_k) {
      to[tile][0] = __ldg(reinterpret_cast<const uint4*>(x[tile] + k));
      to[tile][1] = __ldg(reinterpret_cast<const uint4*>(x[tile] + k) + 1);
    }
  }
}

__device__ inline uint32_t word(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

// Levels of byte `i` of eight as a pair: the byte is moved to the table's stride of 128 bytes, the bank is the lane's.
template <int i>
__device__ inline uint32_t look_up(const char* table, const uint2& bytes, uint32_t lane_offset) {
  const uint32_t half = i < 4 ? bytes.x : bytes.y;
  constexpr int kShift = 8 * (i % 4) - 7;
  const uint32_t moved = kShift < 0 ? half << (kShift < 0 ? -kShift : 0) : half >> (kShift < 0 ? 0 : kShift);
  return *reinterpret_cast<const uint32_t*>(table + ((moved & 0x7f80) | lane_offset));
}

// sum += 16 rows by the 16 k of quarter j: bytes 2j and 2j + 1 of every lane.
template <typename T, int kTiles, int j>
__device__ inline void multiply_quarter(float (&sum)[kTiles][4], const uint2& low, const uint2& high,
                                        const uint4 (&x)[kTiles][2], const char* table, uint32_t lane_offset) {
  const uint32_t a[4] = {look_up<2 * j>(table, low, lane_offset), look_up<2 * j>(table, high, lane_offset),
                         look_up<2 * j + 1>(table, low, lane_offset), look_up<2 * j + 1>(table, high, lane_offset)};
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    const uint4& eight = x[tile][j / 2];
    mma_m16n8k16<T>(sum[tile], a, word(eight, j % 2 * 2), word(eight, j % 2 * 2 + 1));
  }
}

// acc += scale * (16 rows by 64 k): `low` and `high` are this lane's bytes of rows g and g + 8.
template <typename T, int kTiles>
__device__ inline void multiply_half(float (&acc)[kTiles][4], const uint2& low, const uint2& high, float scale_low,
                                     float scale_high, const uint4 (&x)[kTiles][2], const char* table,
                                     uint32_t lane_offset) {
  float sum[kTiles][4] = {};
  multiply_quarter<T, kTiles, 0>(sum, low, high, x, table, lane_offset);
  multiply_quarter<T, kTiles, 1>(sum, low, high, x, table, lane_offset);
  multiply_quarter<T, kTiles, 2>(sum, low, high, x, table, lane_offset);
  multiply_quarter<T, kTiles, 3>(sum, low, high, x, table, lane_offset);
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    acc[tile][0] = fmaf(scale_low, sum[tile][0], acc[tile][0]);
    acc[tile][1] = fmaf(scale_low, sum[tile][1], acc[tile][1]);
    acc[tile][2] = fmaf(scale_high, sum[tile][2], acc[tile][2]);
    acc[tile][3] = fmaf(scale_high, sum[tile][3], acc[tile][3]);
  }
}

// --- kernel ----------------------------------------------------------------------------------------------------------

template <typename T, int kTiles, bool kNested, int kWarps, int kStages>
__global__ void __launch_bounds__(32 * kWarps) kernel(const __grid_constant__ NF4DecodeProblem p) {
  extern __shared__ __align__(128) char smem[];
  char* table = smem;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  char* ring = smem + kTableBytes + warp * kStages * kItemBytes;
  float* partial = reinterpret_cast<float*>(smem + kTableBytes + kWarps * kStages * kItemBytes);
  float* nested_map = partial + partial_floats(kTiles, kWarps);

  uint32_t lane_offset = 4 * lane;
  asm("" : "+r"(lane_offset));  // or the compiler derives it again for every look-up, for one instruction more
  const int units = static_cast<int>(ceil_div(p.n, kUnit));
  const int row_begin = static_cast<int>(static_cast<int64_t>(units) * blockIdx.x / gridDim.x) * kUnit;
  const int row_end = static_cast<int>(static_cast<int64_t>(units) * (blockIdx.x + 1) / gridDim.x) * kUnit;
  constexpr int kStep = kWarps * kItemK;
  const int first_k = warp * kItemK;

  // Items in the order of their use: all k of this warp for a pair of units, then the next pair. Every warp counts them
  // alike, also one that has no k, so that all meet at the barriers.
  int ahead_row = row_begin, ahead_k = first_k, ahead_slot = 0;
  const int row_bytes = p.k / 2;
  const uint8_t* lane_codes = p.w.codes + wide(lane / 4, row_bytes) + 16 * (lane % 4);
  Scales scales[kStages - 1];
  const auto fetch = [&](Scales& to) {
    if (ahead_row < row_end && ahead_k < p.k) {
      copy_codes(ring + ahead_slot * kItemBytes, lane_codes + wide(ahead_row, row_bytes) + ahead_k / 2, row_bytes,
                 min(row_end, p.n) - ahead_row, ahead_k + 32 * (lane % 4) < p.k, lane);
      to = load_scales<kNested>(p.w, wide(min(ahead_row + g + 8 * t, p.n - 1), p.k) + ahead_k, ahead_k + 64 < p.k,
                                p.block_shift);
    }
    commit_async();
    ahead_slot = ahead_slot + 1 == kStages ? 0 : ahead_slot + 1;
    ahead_k += kStep;
    if (ahead_k >= p.k) {
      ahead_k = first_k;
      ahead_row += kPair;
    }
  };
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) fetch(scales[i]);
  const T* lane_x[kTiles];
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    const int token = 8 * tile + g;
    lane_x[tile] = token < p.m ? static_cast<const T*>(p.x) + wide(token, p.k) + kLaneK * t : nullptr;
  }
  uint4 x[kTiles][2];
  load_x(x, lane_x, first_k, first_k < p.k);

  constexpr int kTableStores = kTableBytes / 16 / (32 * kWarps);
#pragma unroll
  for (int i = 0; i < kTableStores; ++i) {
    const int slot = threadIdx.x + 32 * kWarps * i, byte = slot / 8;
    const uint32_t pair = pack_pair<T>(nf4_level(byte >> 4), nf4_level(byte & 15));
    reinterpret_cast<uint4*>(table)[slot] = uint4{pair, pair, pair, pair};
  }
  float offset = 0.0f;
  if constexpr (kNested) {
    for (int i = threadIdx.x; i < 256; i += 32 * kWarps) nested_map[i] = __ldg(p.w.nested_map + i);
    offset = __ldg(p.w.offset);
  }
  __syncthreads();

  int slot = 0;
  for (int row = row_begin; row < row_end; row += kPair) {
    float acc[2][kTiles][4] = {};
    for (int k = first_k; k < p.k; k += kStep) {
      wait_async<kStages - 2>();
      __syncwarp();  // all lanes' copies have arrived, and all lanes are done with the slot that is filled next
      const Scales here = scales[0];
#pragma unroll
      for (int i = 0; i + 1 < kStages - 1; ++i) scales[i] = scales[i + 1];
      fetch(scales[kStages - 2]);
      const char* item = ring + slot * kItemBytes;
      slot = slot + 1 == kStages ? 0 : slot + 1;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint4 next_x[kTiles][2];
        const int next_k = half == 0 ? k + 64 : k + kStep < p.k ? k + kStep : first_k;
        load_x(next_x, lane_x, next_k, next_k < p.k);
        float scale = here.scale[half];
        if constexpr (kNested) scale = __fadd_rn(mul_ftz(nested_map[here.code[half]], scale), offset);
#pragma unroll
        for (int unit = 0; unit < 2; ++unit) {
          const char* from = item + (kUnit * unit + g) * kRowBytes + ((32 * half) ^ (g & 2) * 16) + 8 * t;
          // Lane t of a quad holds the scale of row g + 8t.
          const float scale_low = __shfl_sync(0xffffffff, scale, (lane & ~3) | (2 * unit));
          const float scale_high = __shfl_sync(0xffffffff, scale, (lane & ~3) | (2 * unit + 1));
          if (unit == 1 && row + kUnit >= row_end) break;
          multiply_half<T>(acc[unit], *reinterpret_cast<const uint2*>(from),
                           *reinterpret_cast<const uint2*>(from + 8 * kRowBytes), scale_low, scale_high, x, table,
                           lane_offset);
        }
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          x[tile][0] = next_x[tile][0];
          x[tile][1] = next_x[tile][1];
        }
      }
    }

    if (row != row_begin) __syncthreads();  // the sums of the pair before have been read
    float* mine = partial + warp * 8 * kTiles * kRowStride;
#pragma unroll
    for (int unit = 0; unit < 2; ++unit) {
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          mine[(8 * tile + 2 * t + i % 2) * kRowStride + kUnit * unit + i / 2 * 8 + g] = acc[unit][tile][i];
        }
      }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < kPair * p.m; i += 32 * kWarps) {
      const int r = i % kPair, token = i / kPair;
      const float* from = partial + token * kRowStride + r;
      float sum = 0.0f;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) sum += from[w * 8 * kTiles * kRowStride];
      if (row + r < min(row_end, p.n)) {
        if (p.bias != nullptr) sum += to_float(static_cast<const T*>(p.bias)[row + r]);
        static_cast<T*>(p.y)[static_cast<int64_t>(token) * p.n + row + r] = from_float<T>(sum);
      }
    }
  }
}

}  // namespace nf4_decode
}  // namespace fastpeft::cuda
