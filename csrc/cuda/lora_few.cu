// The low-rank terms of LoRA linears for few tokens.
//
// Plan     Both kernels wait for latency and not for bytes: for rank 16 an adapter is below a megabyte. So k is cut
//          into shares, each a block's, and no block waits for another: the second kernel adds the shares.
//          project: a warp has 16 rows of A and steps of 64 k. A is the 16-row side of mma.m16n8k16, tokens its
//          8-wide side; lane t of a quad takes the 16 consecutive k at 16t of both, as the order of a sum is free.
//          Warps meet in shared memory.
//          add: a thread has a column of y, that is a row of B, and up to 16 tokens.
//          A and B are asked for while the kernel before ends (device/ptx.cuh): what writes weights never lets the
//          next kernel start.
// Limits   k % 64 == 0, up to 64 tokens; A and x at 16-byte boundaries.
#include "fastpeft/lora_few.h"

#include <algorithm>

#include "common/integer.h"
#include "cuda/device/launch.cuh"
#include "cuda/device/numbers.cuh"
#include "cuda/device/ptx.cuh"
#include "cuda/lora_few_config.h"

namespace fastpeft::cuda {
namespace {

constexpr int kStep = kFewStep;          // of k, of a warp
constexpr int kTileRank = kFewRankTile;  // rows of A, of a block
constexpr int kWarps = 8, kThreads = 32 * kWarps;

// Which adapter a block has, by the first block of each.
struct Adapters {
  LoraAdapter each[kMostAdapters];
  int first_block[kMostAdapters];
  int first_column[kMostAdapters];  // in the sums
  int columns;                      // of all

  __device__ int of(int block) const {
    int which = 0;
#pragma unroll
    for (int i = 1; i < kMostAdapters; ++i) which += block >= first_block[i];
    return which;
  }
};

// `blocks_of` gives the blocks of an adapter; returns those of all.
template <typename BlocksOf>
int64_t lay_out(const LoraFewArgs& args, Adapters& adapters, const BlocksOf& blocks_of) {
  int64_t blocks = 0, columns = 0;
  for (int64_t i = 0; i < kMostAdapters; ++i) {
    adapters.first_block[i] = i < args.count ? static_cast<int>(blocks) : INT32_MAX;
    if (i >= args.count) continue;
    adapters.each[i] = args.adapters[i];
    adapters.first_column[i] = static_cast<int>(columns);
    blocks += blocks_of(args.adapters[i]);
    columns += few_columns(args.adapters[i].r);
  }
  adapters.columns = static_cast<int>(columns);
  return blocks;
}

// --- x A^T -----------------------------------------------------------------------------------------------------------

struct ProjectProblem {
  Adapters adapters;
  const void* x;
  float* sums;
  int m, k;
};

template <typename T, int kTiles>
__global__ void __launch_bounds__(kThreads) project_kernel(const __grid_constant__ ProjectProblem p) {
  __shared__ float warp_sums[kWarps][8 * kTiles][kTileRank];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int share = blockIdx.x % kFewShares, tile = blockIdx.x / kFewShares;
  const int which = p.adapters.of(tile), rank0 = (tile - p.adapters.first_block[which]) * kTileRank;
  const LoraAdapter& adapter = p.adapters.each[which];
  const int steps = p.k / kStep, share_steps = (steps + kFewShares - 1) / kFewShares;
  const int end = min(steps, (share + 1) * share_steps);
  const T* x = static_cast<const T*>(p.x);

  float4 a[2][4];  // rows g and g + 8, 16 k
  const auto load_a = [&](int step) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = rank0 + g + 8 * half;
      const float* from = adapter.a + static_cast<int64_t>(row) * p.k + step * kStep + 16 * t;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        a[half][i] = row < adapter.r ? *reinterpret_cast<const float4*>(from + 4 * i) : float4{};
      }
    }
  };
  int step = share * share_steps + warp;
  let_next_kernel_start();
  if (step < end) load_a(step);
  wait_for_kernel_before();

  float sums[kTiles][4] = {};
  for (; step < end; step += kWarps) {
    uint4 tokens[kTiles][2];
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      const int token = 8 * i + g;
      const T* from = x + static_cast<int64_t>(token) * p.k + step * kStep + 16 * t;
      tokens[i][0] = load_16_if(token < p.m, from);
      tokens[i][1] = load_16_if(token < p.m, from + 8);
    }
#pragma unroll
    for (int quarter = 0; quarter < 4; ++quarter) {
      const float4 low = a[0][quarter], high = a[1][quarter];
      const uint32_t rows[4] = {pack_pair<T>(low.x, low.y), pack_pair<T>(high.x, high.y), pack_pair<T>(low.z, low.w),
                                pack_pair<T>(high.z, high.w)};
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        const uint4& eight = tokens[i][quarter / 2];
        const uint32_t first = quarter % 2 == 0 ? eight.x : eight.z, second = quarter % 2 == 0 ? eight.y : eight.w;
        mma_m16n8k16<T>(sums[i], rows, first, second);
      }
    }
    if (step + kWarps < end) load_a(step + kWarps);
  }
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) warp_sums[warp][8 * i + 2 * t + j % 2][g + j / 2 * 8] = sums[i][j];
  }
  __syncthreads();
  for (int i = threadIdx.x; i < p.m * kTileRank; i += kThreads) {
    const int token = i / kTileRank, rank = i % kTileRank;
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += warp_sums[w][token][rank];
    p.sums[(share * p.m + token) * p.adapters.columns + p.adapters.first_column[which] + rank0 + rank] = sum;
  }
}

template <typename T, int kTiles>
void launch_project(const ProjectProblem& p, int64_t tiles, const Context& context) {
  launch([&] { return concat("lora_few_project of m = ", p.m, ", k = ", p.k); }, project_kernel<T, kTiles>,
         Grid{.blocks = static_cast<unsigned>(tiles * kFewShares),
              .threads = kThreads,
              .overlap_launch = device_limits().wgmma},
         context, p);
}

// --- y += scale (x A^T) B^T ------------------------------------------------------------------------------------------

constexpr int kColumns = 128;  // of y, of a block: a thread each

struct AddProblem {
  Adapters adapters;
  const float* sums;
  void* y[kMostAdapters];
  int64_t y_pitch[kMostAdapters];
  int m, groups;  // of tokens
};

template <typename T, int kTokens>
__global__ void __launch_bounds__(kColumns) add_kernel(const __grid_constant__ AddProblem p) {
  __shared__ __align__(16) float xa[kTokens][kTileRank];
  const int group = blockIdx.x % p.groups, block = blockIdx.x / p.groups, which = p.adapters.of(block);
  const LoraAdapter& adapter = p.adapters.each[which];
  const int column = (block - p.adapters.first_block[which]) * kColumns + static_cast<int>(threadIdx.x);
  const int r = static_cast<int>(adapter.r), token0 = group * kTokens, tokens = min(kTokens, p.m - token0);
  const bool is_column = column < adapter.n;
  const float* b_row = adapter.b + static_cast<int64_t>(column) * r;
  const bool aligned = r % 4 == 0 && reinterpret_cast<uintptr_t>(adapter.b) % 16 == 0;

  float4 b[kTileRank / 4];
  const auto load_b = [&](int rank0) {
#pragma unroll
    for (int i = 0; i < kTileRank / 4; ++i) {
      const int rank = rank0 + 4 * i;
      if (aligned) {
        b[i] = is_column && rank < r ? *reinterpret_cast<const float4*>(b_row + rank) : float4{};
      } else {
        const auto at = [&](int j) { return is_column && rank + j < r ? b_row[rank + j] : 0.0f; };
        b[i] = make_float4(at(0), at(1), at(2), at(3));
      }
    }
  };
  let_next_kernel_start();
  load_b(0);
  wait_for_kernel_before();

  T* y = static_cast<T*>(p.y[which]) + token0 * p.y_pitch[which] + column;
  T before[kTokens];
#pragma unroll
  for (int i = 0; i < kTokens; ++i) {
    before[i] = i < tokens && is_column ? y[i * p.y_pitch[which]] : from_float<T>(0.0f);
  }
  float added[kTokens] = {};
  for (int rank0 = 0; rank0 < r; rank0 += kTileRank) {
    if (rank0 > 0) {
      load_b(rank0);
      __syncthreads();
    }
#pragma unroll
    for (int i = threadIdx.x; i < kTokens * kTileRank; i += kColumns) {
      const int token = i / kTileRank, rank = i % kTileRank;
      float sum = 0.0f;
      if (token < tokens) {
        const float* from =
            p.sums + (token0 + token) * p.adapters.columns + p.adapters.first_column[which] + rank0 + rank;
        float shares[kFewShares];
#pragma unroll
        for (int share = 0; share < kFewShares; ++share) shares[share] = from[share * p.m * p.adapters.columns];
#pragma unroll
        for (int share = 0; share < kFewShares; ++share) sum += shares[share];
      }
      xa[token][rank] = sum;
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
#pragma unroll
      for (int j = 0; j < kTileRank / 4; ++j) {
        const float4 v = *reinterpret_cast<const float4*>(&xa[i][4 * j]);
        added[i] = fmaf(v.x, b[j].x, added[i]), added[i] = fmaf(v.y, b[j].y, added[i]);
        added[i] = fmaf(v.z, b[j].z, added[i]), added[i] = fmaf(v.w, b[j].w, added[i]);
      }
    }
  }
  const float scale = static_cast<float>(adapter.scale);
#pragma unroll
  for (int i = 0; i < kTokens; ++i) {
    if (i < tokens && is_column) y[i * p.y_pitch[which]] = from_float<T>(fmaf(scale, added[i], to_float(before[i])));
  }
}

template <typename T, int kTokens>
void launch_add(const AddProblem& p, int64_t blocks, const Context& context) {
  launch([&] { return concat("lora_few_add of m = ", p.m); }, add_kernel<T, kTokens>,
         Grid{.blocks = static_cast<unsigned>(blocks * p.groups),
              .threads = kColumns,
              .overlap_launch = device_limits().wgmma},
         context, p);
}

// --- both ------------------------------------------------------------------------------------------------------------

void check_few(const char* function, const LoraFewArgs& args) {
  check(args.count >= 1 && args.count <= kMostAdapters, function, ": ", args.count, " adapters; needs 1 to ",
        kMostAdapters);
  int64_t ranks[kMostAdapters] = {};
  for (int64_t i = 0; i < args.count; ++i) {
    const LoraAdapter& adapter = args.adapters[i];
    ranks[i] = adapter.r;
    check(adapter.n >= 1 && adapter.n < (1 << 30), function, ": adapter ", i, " has n ", adapter.n);
  }
  check(lora_few_floats(args.m, args.k, ranks, args.count, args.dtype, device_limits().architecture) > 0, function,
        ": takes no call of m = ", args.m, ", k = ", args.k, "; the caller has to ask before");
}

}  // namespace

void lora_few_project(const LoraFewArgs& args, const Context& context) {
  check_few("lora_few_project", args);
  ProjectProblem p{};
  p.x = args.x, p.sums = args.sums, p.m = static_cast<int>(args.m), p.k = static_cast<int>(args.k);
  const int64_t tiles =
      lay_out(args, p.adapters, [](const LoraAdapter& adapter) { return ceil_div(adapter.r, kTileRank); });
  check(is_aligned(args.x), "lora_few: x is not aligned to 16 bytes");
  for (int64_t i = 0; i < args.count; ++i) {
    check(is_aligned(args.adapters[i].a), "lora_few: A of adapter ", i, " is not aligned to 16 bytes");
  }
  dispatch_16bit("lora_few_project", args.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (p.m <= 8) return launch_project<T, 1>(p, tiles, context);
    if (p.m <= 16) return launch_project<T, 2>(p, tiles, context);
    if (p.m <= 32) return launch_project<T, 4>(p, tiles, context);
    launch_project<T, 8>(p, tiles, context);
  });
}

void lora_few_add(const LoraFewArgs& args, const Context& context) {
  check_few("lora_few_add", args);
  AddProblem p{};
  p.sums = args.sums, p.m = static_cast<int>(args.m);
  std::copy(args.y, args.y + args.count, p.y);
  std::copy(args.y_pitch, args.y_pitch + args.count, p.y_pitch);
  const int64_t blocks =
      lay_out(args, p.adapters, [](const LoraAdapter& adapter) { return ceil_div(adapter.n, kColumns); });
  const int tokens = p.m <= 4 ? 4 : p.m <= 8 ? 8 : 16;
  p.groups = static_cast<int>(ceil_div(p.m, tokens));
  dispatch_16bit("lora_few_add", args.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (tokens == 4) return launch_add<T, 4>(p, blocks, context);
    if (tokens == 8) return launch_add<T, 8>(p, blocks, context);
    launch_add<T, 16>(p, blocks, context);
  });
}

}  // namespace fastpeft::cuda
