// Attention of one new token a row over a cache in pages.
//
// Layout   k_pages, v_pages [pages, kv_heads, page_size, dim]; a token's row of a head is 16-byte packs
// Plan     A block has one row, one head of k with up to kGroup heads of q, and one part of the row's tokens; so keys
//          and values are read once. kLanes lanes share a token, a pack each; so a warp reads 32 / kLanes tokens an
//          instruction, and has two rounds of kAtOnce of them under way, keys and values both: each lane copies what it
//          will read itself into shared memory (cp.async), which costs no registers and needs no barrier. Each group of
//          lanes keeps a softmax of its own; groups, then warps, then parts are summed at the end, in a fixed order.
//          The heads of q and the new key are rotated once a block. The part with the last token takes the new key and
//          value from there, and writes them to their page for the next steps.
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
__device__ float rotated(const float* x, int i, int rotary, const float* cos, const float* sin) {
  const int half = rotary / 2;
  if (i >= rotary) return x[i];
  const float other = i < half ? -x[i + half] : x[i - half];
  return to_float(from_float<T>(fmaf(x[i], cos[i], __fmul_rn(other, sin[i]))));
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
#pragma unroll 4
    for (int part = 0; part < used; ++part) {
      const float* from = part_of(args, row, head, part);
      const float part_max = __ldcg(from + dim), part_sum = __ldcg(from + dim + 1), part_value = __ldcg(from + column);
      const Weights weights(max, part_max);
      sum = sum * weights.first + part_sum * weights.second;
      value = value * weights.first + part_value * weights.second;
      max = weights.max;
    }
    static_cast<T*>(args.out)[(row * args.heads + head) * dim + column] = from_float<T>(value / sum);
  }
}

// --- kernel ----------------------------------------------------------------------------------------------------------

constexpr int kRounds = 2;  // under way
template <int kGroup>
constexpr int kAtOnce = kGroup == 8 ? 2 : 4;

// Shared memory: floats for the heads of q and the new key as they came, then rotated, the new value, cos and sin; then
// what is under way, and in the same place the sums of warps.
template <int kGroup>
constexpr int prologue_floats(int dim) {
  return (2 * (kGroup + 1) + 3) * dim;
}
template <int kGroup>
constexpr int under_way_bytes() {
  return kRounds * kAtOnce<kGroup> * 2 * kThreads * 16;
}
template <int kGroup>
constexpr int shared_bytes(int dim) {
  const int sums = 4 * kWarps * kGroup * dim;
  return 4 * prologue_floats<kGroup>(dim) + (sums > under_way_bytes<kGroup>() ? sums : under_way_bytes<kGroup>());
}

template <typename T, int kLanes, int kGroup>
__global__ void __launch_bounds__(kThreads, kGroup == 8 ? 2 : 4)
    paged_attention_kernel(const __grid_constant__ PagedAttentionArgs args, const __grid_constant__ Cut cut) {
  constexpr int kSide = 32 / kLanes;  // tokens side by side in a warp
  constexpr int kN = kEach<T>, kTokens = kAtOnce<kGroup>, kStride = kWarps * kSide;
  extern __shared__ __align__(16) float shared[];
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
  const bool joins = part == used - 1;  // the new token
  const int begin = oldest + part * part_tokens, end = min(length, begin + part_tokens);

  const int32_t* table = args.table + row * args.row_pages;
  const auto place = [&](int token) {
    const int64_t page = table[token >> cut.page_shift];
    return (((page * args.kv_heads + kv_head) << cut.page_shift) + (token & ((1 << cut.page_shift) - 1))) * dim;
  };
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, side = lane / kLanes, column = lane % kLanes * kN;
  const int first_token = begin + warp * kSide + side;

  // Keys and values of a round, each lane its own packs.
  float* after_prologue = shared + prologue_floats<kGroup>(dim);
  uint4* under_way = reinterpret_cast<uint4*>(after_prologue) + threadIdx.x;
  const auto slot = [&](int round, int i, int of_v) {
    return under_way + ((round % kRounds * kTokens + i) * 2 + of_v) * kThreads;
  };
  const auto fetch = [&](int round) {
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      const int token = first_token + (round * kTokens + i) * kStride;
      if (token < end && column < dim) {
        const int64_t from = place(token) + column;
        copy_async_16(smem_address(slot(round, i, 0)), static_cast<const T*>(args.k_pages) + from);
        copy_async_16(smem_address(slot(round, i, 1)), static_cast<const T*>(args.v_pages) + from);
      }
    }
    commit_async();
  };
#pragma unroll
  for (int round = 0; round < kRounds; ++round) fetch(round);

  // The heads of q, the new key and value, and the angles, as they came; then rotated.
  float *came = shared, *turned = came + (kGroup + 1) * dim, *new_v = turned + (kGroup + 1) * dim;
  float *cos = new_v + dim, *sin = cos + dim;
  {
    const T* q = static_cast<const T*>(args.q.values) + row * args.q.row_stride + first_head * args.q.head_stride;
    const T* k = static_cast<const T*>(args.k.values) + row * args.k.row_stride + kv_head * args.k.head_stride;
    const T* v = static_cast<const T*>(args.v.values) + row * args.v.row_stride + kv_head * args.v.head_stride;
#pragma unroll 8
    for (int i = threadIdx.x; i < heads * dim; i += kThreads) {
      came[i] = to_float(q[i / dim * args.q.head_stride + i % dim]);
    }
    for (int i = threadIdx.x; i < dim; i += kThreads) {
      came[kGroup * dim + i] = to_float(k[i]), new_v[i] = to_float(v[i]);
      if (i < rotary) {
        cos[i] = to_float(static_cast<const T*>(args.cos)[row * rotary + i]);
        sin[i] = to_float(static_cast<const T*>(args.sin)[row * rotary + i]);
      }
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < heads * dim; i += kThreads) {
    turned[i] = rotated<T>(came + i / dim * dim, i % dim, rotary, cos, sin) * cut.score_scale;
  }
  if (joins) {
    const int64_t to = place(length);
    for (int i = threadIdx.x; i < dim; i += kThreads) {
      const float x = rotated<T>(came + kGroup * dim, i, rotary, cos, sin);
      turned[kGroup * dim + i] = x;
      static_cast<T*>(args.k_pages)[to + i] = from_float<T>(x);
      static_cast<T*>(args.v_pages)[to + i] = from_float<T>(new_v[i]);
    }
  }
  __syncthreads();
  float q[kGroup][kN];
#pragma unroll
  for (int head = 0; head < kGroup; ++head) {
#pragma unroll
    for (int i = 0; i < kN; ++i) q[head][i] = head < heads && column < dim ? turned[head * dim + column + i] : 0.0f;
  }

  Softmax softmax[kGroup];
  float sums[kGroup][kN] = {};
  // The score of a token, before its maximum is known; in all lanes of a group.
  const auto score_of = [&](const float(&k)[kN], int head) {
    float score = 0.0f;
#pragma unroll
    for (int j = 0; j < kN; ++j) score += q[head][j] * k[j];
#pragma unroll
    for (int distance = kLanes / 2; distance > 0; distance /= 2) score += __shfl_xor_sync(~0u, score, distance);
    if (args.softcap > 0) {
      const float cap = static_cast<float>(args.softcap);
      score = cap * tanhf(score / cap) * kLog2E;
    }
    return score;
  };
  // Makes room for scores up to `max`.
  const auto raise = [&](int head, float max) {
    const Weights weights(softmax[head].max, max);
    softmax[head].max = weights.max, softmax[head].sum *= weights.first;
#pragma unroll
    for (int j = 0; j < kN; ++j) sums[head][j] *= weights.first;
    return weights.max == -INFINITY ? 0.0f : weights.max;
  };
  const auto unpack = [](const uint4& from, float(&to)[kN]) {
    const T* values = reinterpret_cast<const T*>(&from);
#pragma unroll
    for (int j = 0; j < kN; ++j) to[j] = to_float(values[j]);
  };
  const int rounds = (end - begin + kStride * kTokens - 1) / (kStride * kTokens);
#pragma unroll 1
  for (int round = 0; round < rounds; ++round) {
    wait_async<kRounds - 1>();
    float scores[kTokens][kGroup];
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      const bool is_token = first_token + (round * kTokens + i) * kStride < end;
      float k[kN];
      unpack(is_token && column < dim ? *slot(round, i, 0) : uint4{}, k);
#pragma unroll
      for (int head = 0; head < kGroup; ++head) {
        const float score = score_of(k, head);
        scores[i][head] = is_token ? score : -INFINITY;
      }
    }
#pragma unroll
    for (int head = 0; head < kGroup; ++head) {
      float max = scores[0][head];
#pragma unroll
      for (int i = 1; i < kTokens; ++i) max = fmaxf(max, scores[i][head]);
      const float shift = raise(head, max);
#pragma unroll
      for (int i = 0; i < kTokens; ++i) {
        scores[i][head] = exp2f(scores[i][head] - shift);
        softmax[head].sum += scores[i][head];
      }
    }
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      const bool is_token = first_token + (round * kTokens + i) * kStride < end;
      float v[kN];
      unpack(is_token && column < dim ? *slot(round, i, 1) : uint4{}, v);
#pragma unroll
      for (int head = 0; head < kGroup; ++head) {
#pragma unroll
        for (int j = 0; j < kN; ++j) sums[head][j] += scores[i][head] * v[j];
      }
    }
    fetch(round + kRounds);
  }
  if (joins && warp == 0) {  // the new token, by the first group of lanes
    float k[kN], v[kN];
#pragma unroll
    for (int j = 0; j < kN; ++j) {
      k[j] = column < dim ? turned[kGroup * dim + column + j] : 0.0f;
      v[j] = column < dim ? new_v[column + j] : 0.0f;
    }
#pragma unroll
    for (int head = 0; head < kGroup; ++head) {
      const float score = score_of(k, head);
      const float shift = raise(head, side == 0 ? score : -INFINITY);
      const float weight = side == 0 ? exp2f(score - shift) : 0.0f;
      softmax[head].sum += weight;
#pragma unroll
      for (int j = 0; j < kN; ++j) sums[head][j] += weight * v[j];
    }
  }
  wait_async<0>();
  __syncthreads();  // what was under way is read: its place takes the sums
  float* of_warps = after_prologue;

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
        if (at < dim) of_warps[(warp * kGroup + head) * dim + at] = sums[head][j];
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
      value = value * weights.first + of_warps[(other * kGroup + head) * dim + at] * weights.second;
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
  launch([&] { return concat("paged_attention of ", args.rows, " rows of ", args.heads, " heads of ", args.dim); },
         paged_attention_kernel<T, kLanes, kGroup>,
         Grid{.blocks = static_cast<unsigned>(blocks),
              .threads = kThreads,
              .smem_bytes = static_cast<unsigned>(shared_bytes<kGroup>(static_cast<int>(args.dim))),
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
