// Attention of one new token a row over a cache in pages.
//
// Layout   k_pages, v_pages [pages, kv_heads, page_size, dim]; a token's row of a head is 16-byte packs
// Plan     A block has one row, one head of k with up to kGroup heads of q, and one part of the row's tokens; so keys
//          and values are read once. kLanes lanes share a token, a pack each; so a warp reads 32 / kLanes
//          tokens an instruction, and has kAtOnce of them under way, keys and values both. Each group of lanes keeps a
//          softmax of its own, without a barrier in the loop; groups, then warps, then parts are summed at the end, in
//          a fixed order. The part with the last token writes the new key and value to their page before it reads it.
//          Tokens are cut into parts here, by the row's length, since a captured graph is replayed with any length.
// Limits   dim is whole packs of 16 bytes, at most 32: 256 elements, of float32 128.
// Source   parts and their sum: Dao et al., "Flash-Decoding for long-context inference", 2023; online softmax: Milakov
//          and Gimelshein, arXiv 1805.02867.
#include "fastpeft/paged_attention.h"

#include <cmath>

#include "common/paged_attention_checks.h"
#include "cuda/device/launch.cuh"
#include "cuda/device/numbers.cuh"
#include "cuda/device/ptx.cuh"
#include "cuda/paged_attention_config.h"

namespace fastpeft::cuda {
namespace {

constexpr int kWarps = 4, kThreads = 32 * kWarps;
constexpr float kLog2E = 1.44269504088896f;

template <typename T>
constexpr int kEach = 16 / sizeof(T);

struct Cut {
  int share;   // heads of q a head of k has
  int blocks;  // of heads, of a row
  int parts;   // at most, of a row's tokens
  int page_shift;
  float score_scale;  // of q . k; towards powers of two, unless there is a cap
};

// Of several tokens, for one head: relative to 2^max.
struct Softmax {
  float max = -INFINITY, sum = 0.0f;
};

// What both sides of a sum are multiplied by, and its maximum. Two empty sides stay empty.
struct Weights {
  float max, first, second;
  __device__ Weights(float a, float b) : max(fmaxf(a, b)) {
    const float shift = max == -INFINITY ? 0.0f : max;
    first = exp2f(a - shift), second = exp2f(b - shift);
  }
};

// Element i of a head, rotated and rounded, to the bits of rope.cu. `x` is the head as it came.
template <typename T>
__device__ float rotated(const float* x, int i, int rotary, const T* cos, const T* sin) {
  const int half = rotary / 2;
  if (i >= rotary) return x[i];
  const float other = i < half ? -x[i + half] : x[i - half];
  return to_float(from_float<T>(fmaf(x[i], to_float(cos[i]), __fmul_rn(other, to_float(sin[i])))));
}

// --- sums of parts ---------------------------------------------------------------------------------------------------

// A part's sums of a head are dim values, then the maximum and the sum of weights.
__device__ inline float* part_of(const PagedAttentionArgs& args, int64_t row, int head, int part) {
  return args.partial + ((row * args.heads + head) * args.parts + part) * (args.dim + 2);
}

template <typename T>
__device__ void sum_parts(const PagedAttentionArgs& args, int64_t row, int first_head, int heads, int used) {
  const int dim = static_cast<int>(args.dim);
  for (int i = threadIdx.x; i < heads * dim; i += kThreads) {
    const int head = first_head + i / dim, column = i % dim;
    float max = -INFINITY, sum = 0.0f, value = 0.0f;
    for (int part = 0; part < used; ++part) {
      const float* from = part_of(args, row, head, part);
      const Weights weights(max, __ldcg(from + dim));
      sum = sum * weights.first + __ldcg(from + dim + 1) * weights.second;
      value = value * weights.first + __ldcg(from + column) * weights.second;
      max = weights.max;
    }
    static_cast<T*>(args.out)[(row * args.heads + head) * dim + column] = from_float<T>(value / sum);
  }
}

// --- kernel ----------------------------------------------------------------------------------------------------------

template <typename T, int kLanes, int kGroup>
__global__ void __launch_bounds__(kThreads)
    paged_attention_kernel(const __grid_constant__ PagedAttentionArgs args, const __grid_constant__ Cut cut) {
  constexpr int kSide = 32 / kLanes;  // tokens side by side in a warp
  constexpr int kAtOnce = kGroup == 8 ? 2 : 4;
  constexpr int kN = kEach<T>;
  extern __shared__ float shared[];  // [kGroup + 1, dim] of q and the new k; then [kWarps, kGroup, dim] of sums
  __shared__ float warp_max[kWarps][kGroup], warp_sum[kWarps][kGroup];
  __shared__ bool is_last;
  let_next_kernel_start();
  wait_for_kernel_before();

  const int part = blockIdx.x % cut.parts, block = blockIdx.x / cut.parts % cut.blocks;
  const int64_t row = blockIdx.x / cut.parts / cut.blocks;
  const int blocks_a_head = cut.blocks / static_cast<int>(args.kv_heads);
  const int kv_head = block / blocks_a_head, first_in_share = block % blocks_a_head * kGroup;
  const int first_head = kv_head * cut.share + first_in_share, heads = min(kGroup, cut.share - first_in_share);
  const int dim = static_cast<int>(args.dim), rotary = static_cast<int>(args.rotary);
  T* out = static_cast<T*>(args.out) + (row * args.heads + first_head) * dim;

  const int length = args.lengths[row];
  if (length < 0 || length >= args.row_pages << cut.page_shift) {  // idle, or without room
    for (int i = threadIdx.x; part == 0 && i < heads * dim; i += kThreads) out[i] = from_float<T>(0.0f);
    return;
  }
  const int tokens = length + 1, oldest = args.window > 0 ? max(0, tokens - static_cast<int>(args.window)) : 0;
  const int wanted = (tokens - oldest + cut.parts - 1) / cut.parts;
  const int part_tokens = (wanted + kPagedPartTokens - 1) / kPagedPartTokens * kPagedPartTokens;
  const int used = (tokens - oldest + part_tokens - 1) / part_tokens;
  if (part >= used) return;
  const int begin = oldest + part * part_tokens, end = min(tokens, begin + part_tokens);

  const int32_t* table = args.table + row * args.row_pages;
  const auto place = [&](int token) {
    const int64_t page = table[token >> cut.page_shift];
    return (((page * args.kv_heads + kv_head) << cut.page_shift) + (token & ((1 << cut.page_shift) - 1))) * dim;
  };
  const T* k_pages = static_cast<const T*>(args.k_pages);
  const T* v_pages = static_cast<const T*>(args.v_pages);

  // The heads of q, and the new key, as they came.
  const T* cos = static_cast<const T*>(args.cos) + row * rotary;
  const T* sin = static_cast<const T*>(args.sin) + row * rotary;
  const T* q_row = static_cast<const T*>(args.q.values) + row * args.q.row_stride + first_head * args.q.head_stride;
  for (int i = threadIdx.x; i < heads * dim; i += kThreads)
    shared[i] = to_float(q_row[i / dim * args.q.head_stride + i % dim]);
  const bool joins = end == tokens;
  float* new_k = shared + kGroup * dim;
  if (joins) {
    const T* k = static_cast<const T*>(args.k.values) + row * args.k.row_stride + kv_head * args.k.head_stride;
    for (int i = threadIdx.x; i < dim; i += kThreads) new_k[i] = to_float(k[i]);
  }
  __syncthreads();
  if (joins) {
    const T* v = static_cast<const T*>(args.v.values) + row * args.v.row_stride + kv_head * args.v.head_stride;
    const int64_t to = place(length);
    for (int i = threadIdx.x; i < dim; i += kThreads) {
      static_cast<T*>(args.k_pages)[to + i] = from_float<T>(rotated(new_k, i, rotary, cos, sin));
      static_cast<T*>(args.v_pages)[to + i] = v[i];
    }
  }
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, side = lane / kLanes, column = lane % kLanes * kN;
  float q[kGroup][kN];
#pragma unroll
  for (int head = 0; head < kGroup; ++head) {
#pragma unroll
    for (int i = 0; i < kN; ++i) {
      const int at = column + i;
      const bool is_there = head < heads && at < dim;
      q[head][i] = is_there ? rotated(shared + head * dim, at, rotary, cos, sin) * cut.score_scale : 0.0f;
    }
  }
  __syncthreads();  // the new key and value are in their page; shared memory is free

  Softmax softmax[kGroup];
  float sums[kGroup][kN] = {};
#pragma unroll 1
  for (int base = begin + warp * kSide; base < end; base += kWarps * kSide * kAtOnce) {
    Pack<T, kN> k[kAtOnce], v[kAtOnce];
    bool is_token[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int token = base + i * kWarps * kSide + side;
      is_token[i] = token < end;
      const int64_t from = place(is_token[i] ? token : begin) + column;
      const bool is_wanted = is_token[i] && column < dim;
      k[i] = load_pack_if<T, kN>(is_wanted, k_pages + from);
      v[i] = load_pack_if<T, kN>(is_wanted, v_pages + from);
    }
    float scores[kAtOnce][kGroup];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
#pragma unroll
      for (int head = 0; head < kGroup; ++head) {
        float score = 0.0f;
#pragma unroll
        for (int j = 0; j < kN; ++j) score += q[head][j] * to_float(k[i].values[j]);
#pragma unroll
        for (int distance = kLanes / 2; distance > 0; distance /= 2) score += __shfl_xor_sync(~0u, score, distance);
        if (args.softcap > 0) {
          const float cap = static_cast<float>(args.softcap);
          score = cap * tanhf(score / cap) * kLog2E;
        }
        scores[i][head] = is_token[i] ? score : -INFINITY;
      }
    }
#pragma unroll
    for (int head = 0; head < kGroup; ++head) {
      float max = scores[0][head];
#pragma unroll
      for (int i = 1; i < kAtOnce; ++i) max = fmaxf(max, scores[i][head]);
      const Weights weights(softmax[head].max, max);
      const float shift = weights.max == -INFINITY ? 0.0f : weights.max;
      softmax[head].max = weights.max, softmax[head].sum *= weights.first;
#pragma unroll
      for (int j = 0; j < kN; ++j) sums[head][j] *= weights.first;
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const float weight = exp2f(scores[i][head] - shift);
        softmax[head].sum += weight;
#pragma unroll
        for (int j = 0; j < kN; ++j) sums[head][j] += weight * to_float(v[i].values[j]);
      }
    }
  }

  // Groups of lanes, then warps.
#pragma unroll
  for (int head = 0; head < kGroup; ++head) {
#pragma unroll
    for (int distance = kLanes; distance < 32; distance *= 2) {
      const Weights weights(softmax[head].max, __shfl_xor_sync(~0u, softmax[head].max, distance));
      const float other = __shfl_xor_sync(~0u, softmax[head].sum, distance);
      softmax[head].max = weights.max;
      softmax[head].sum = softmax[head].sum * weights.first + other * weights.second;
#pragma unroll
      for (int j = 0; j < kN; ++j) {
        const float other_value = __shfl_xor_sync(~0u, sums[head][j], distance);
        sums[head][j] = sums[head][j] * weights.first + other_value * weights.second;
      }
    }
    if (lane == 0) warp_max[warp][head] = softmax[head].max, warp_sum[warp][head] = softmax[head].sum;
    if (side == 0) {
#pragma unroll
      for (int j = 0; j < kN; ++j) {
        const int at = column + j;
        if (at < dim) shared[(warp * kGroup + head) * dim + at] = sums[head][j];
      }
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < heads * dim; i += kThreads) {
    const int head = i / dim, at = i % dim;
    float max = -INFINITY, sum = 0.0f, value = 0.0f;
#pragma unroll
    for (int other = 0; other < kWarps; ++other) {
      const Weights weights(max, warp_max[other][head]);
      sum = sum * weights.first + warp_sum[other][head] * weights.second;
      value = value * weights.first + shared[(other * kGroup + head) * dim + at] * weights.second;
      max = weights.max;
    }
    if (used == 1) {
      out[i] = from_float<T>(value / sum);
    } else {
      float* to = part_of(args, row, first_head + head, part);
      to[at] = value;
      if (at == 0) to[dim] = max, to[dim + 1] = sum;
    }
  }
  if (used == 1) return;
  __threadfence();
  __syncthreads();
  unsigned* counter = args.counters + row * cut.blocks + block;
  if (threadIdx.x == 0) {
    is_last = atomicAdd(counter, 1) == static_cast<unsigned>(used) - 1;
    if (is_last) *counter = 0;
  }
  __syncthreads();
  if (!is_last) return;
  __threadfence();
  sum_parts<T>(args, row, first_head, heads, used);
}

// --- launcher --------------------------------------------------------------------------------------------------------

template <typename T, int kLanes, int kGroup>
void launch_group(const PagedAttentionArgs& args, const Cut& cut, const Context& context) {
  const int64_t blocks = args.rows * cut.blocks * cut.parts;
  check(blocks <= INT32_MAX, "paged_attention: ", args.rows, " rows of ", args.heads, " heads are too many");
  const int rows_shared = kWarps * kGroup > kGroup + 1 ? kWarps * kGroup : kGroup + 1;
  launch([&] { return concat("paged_attention of ", args.rows, " rows of ", args.heads, " heads of ", args.dim); },
         paged_attention_kernel<T, kLanes, kGroup>,
         Grid{.blocks = static_cast<unsigned>(blocks),
              .threads = kThreads,
              .smem_bytes = static_cast<unsigned>(4 * rows_shared * args.dim),
              .overlap_launch = device_limits().wgmma},
         context, args, cut);
}

template <typename T, int kLanes>
void launch_lanes(const PagedAttentionArgs& args, int group, const Cut& cut, const Context& context) {
  if (group == 1) return launch_group<T, kLanes, 1>(args, cut, context);
  if (group == 4) return launch_group<T, kLanes, 4>(args, cut, context);
  launch_group<T, kLanes, 8>(args, cut, context);
}

template <typename T>
void launch_dim(const PagedAttentionArgs& args, int group, const Cut& cut, const Context& context) {
  const int64_t packs = args.dim / kEach<T>;
  if (packs <= 8) return launch_lanes<T, 8>(args, group, cut, context);
  if (packs <= 16) return launch_lanes<T, 16>(args, group, cut, context);
  launch_lanes<T, 32>(args, group, cut, context);
}

}  // namespace

void paged_attention(const PagedAttentionArgs& args, const Context& context) {
  check_paged_attention(args);
  const DeviceLimits device = device_limits();
  const PagedAttentionPlan plan =
      paged_attention_plan(args.rows, args.heads, args.kv_heads, args.dim, args.row_pages * args.page_size, device);
  check(args.parts == plan.parts, "paged_attention: got workspace for ", args.parts, " parts, needs ", plan.parts);
  dispatch("paged_attention", args.dtype, [&](auto zero) {
    using T = decltype(zero);
    check(args.dim % kEach<T> == 0 && args.dim <= 32 * kEach<T>, "paged_attention: heads have ", args.dim,
          " elements; on CUDA it must be a multiple of ", kEach<T>, ", at most ", 32 * kEach<T>);
    check(is_aligned(args.k_pages) && is_aligned(args.v_pages), "paged_attention: pages must lie on 16-byte borders");
    const float scale = static_cast<float>(args.scale);
    const Cut cut{static_cast<int>(args.heads / args.kv_heads), static_cast<int>(plan.blocks),
                  static_cast<int>(plan.parts), log2_of(args.page_size), args.softcap > 0 ? scale : scale * kLog2E};
    launch_dim<T>(args, plan.group, cut, context);
  });
}

}  // namespace fastpeft::cuda
