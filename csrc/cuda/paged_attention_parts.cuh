// Attention of one new token a row over pages, what its two kernels share: a block's place, and the sums of parts.
//
// Plan     A block has one row, one head of k with up to a group of heads of q, and one part of the row's tokens; so
//          keys and values are read once. The heads of q and the new key are rotated once a block. The part with the
//          last token takes the new key and value from there, and writes them to their page for the next steps.
//          Tokens are cut into parts here, by the row's length, since a captured graph is replayed with any length.
// Source   parts and their sum: Dao et al., "Flash-Decoding for long-context inference", 2023.
#pragma once

#include <cmath>

#include "cuda/device/numbers.cuh"
#include "cuda/device/ptx.cuh"
#include "cuda/paged_attention_config.h"
#include "fastpeft/paged_attention.h"

namespace fastpeft::cuda::paged {

constexpr int kWarps = 4, kThreads = 32 * kWarps;
constexpr float kLog2E = 1.44269504088896f;

struct Cut {
  int share;   // heads of q a head of k has
  int blocks;  // of heads, of a row
  int parts;   // at most, of a row's tokens
  int page_shift;
  float score_scale;  // of q . k; towards powers of two, unless there is a cap
};

// What both sides of a sum are multiplied by, and its maximum. Two empty sides stay empty.
struct Weights {
  float max, first, second;
  __device__ Weights(float a, float b) : max(fmaxf(a, b)) {
    const float shift = max == -INFINITY ? 0.0f : max;
    first = exp2_approx_ftz(a - shift), second = exp2_approx_ftz(b - shift);
  }
};

// A score as softmax takes it, towards powers of two.
__device__ inline float capped(float score, const PagedAttentionArgs& args) {
  if (args.softcap <= 0) return score;
  const float cap = static_cast<float>(args.softcap);
  return cap * tanhf(score / cap) * kLog2E;
}

// Which heads and tokens a thread block has.
struct Place {
  int64_t row;
  int part, used, block;  // its part of the parts in use; its block of heads
  int kv_head, first_head, heads;
  int length;      // of the row before the new token
  int begin, end;  // of the tokens of the part, without the new one
  bool joins;      // the new token belongs to the part
  bool is_idle;    // no token joins: the row is idle, or without room
  bool has_work;

  __device__ Place(const PagedAttentionArgs& args, const Cut& cut, int group) {
    part = blockIdx.x % cut.parts, block = blockIdx.x / cut.parts % cut.blocks;
    row = blockIdx.x / cut.parts / cut.blocks;
    const int blocks_a_head = cut.blocks / static_cast<int>(args.kv_heads), first = block % blocks_a_head * group;
    kv_head = block / blocks_a_head;
    first_head = kv_head * cut.share + first, heads = min(group, cut.share - first);
    length = args.lengths[row];
    is_idle = length < 0 || length >= args.row_pages << cut.page_shift;
    const int tokens = length + 1, oldest = args.window > 0 ? max(0, tokens - static_cast<int>(args.window)) : 0;
    const int wanted = (tokens - oldest + cut.parts - 1) / cut.parts;
    const int part_tokens = (wanted + kPagedPartTokens - 1) / kPagedPartTokens * kPagedPartTokens;
    used = (tokens - oldest + part_tokens - 1) / part_tokens;
    has_work = !is_idle && part < used;
    joins = part == used - 1;
    begin = oldest + part * part_tokens, end = min(length, begin + part_tokens);
  }
};

// Elements from the beginning of the pages to a token of a row, of one head.
__device__ inline int64_t token_at(const PagedAttentionArgs& args, const Cut& cut, const Place& at, int token) {
  const int64_t page = args.table[at.row * args.row_pages + (token >> cut.page_shift)];
  return (((page * args.kv_heads + at.kv_head) << cut.page_shift) + (token & ((1 << cut.page_shift) - 1))) * args.dim;
}

template <typename T>
__device__ void write_zeros(const PagedAttentionArgs& args, const Place& at) {
  const int dim = static_cast<int>(args.dim);
  T* out = static_cast<T*>(args.out) + (at.row * args.heads + at.first_head) * dim;
  for (int i = threadIdx.x; at.part == 0 && i < at.heads * dim; i += kThreads) out[i] = from_float<T>(0.0f);
}

// Puts the heads of q, rotated and rounded to the bits of rope.cu, into shared memory, and where the new token joins,
// its key and value there and into their page. A warp has a head at a time.
template <typename T>
__device__ void take_new_token(const PagedAttentionArgs& args, const Cut& cut, const Place& at, T* q, int q_pitch,
                               T* new_k, T* new_v) {
  const int lane = threadIdx.x % 32, dim = static_cast<int>(args.dim), rotary = static_cast<int>(args.rotary);
  const int half = rotary / 2;
  const T *cos = static_cast<const T*>(args.cos) + at.row * rotary,
          *sin = static_cast<const T*>(args.sin) + at.row * rotary;
  const auto rotate = [&](const T* from, auto&& put) {
    for (int i = lane; i < half; i += 32) {
      const float a = to_float(from[i]), b = to_float(from[i + half]);
      put(i, from_float<T>(fmaf(a, to_float(cos[i]), __fmul_rn(-b, to_float(sin[i])))));
      put(i + half, from_float<T>(fmaf(b, to_float(cos[i + half]), __fmul_rn(a, to_float(sin[i + half])))));
    }
    for (int i = rotary + lane; i < dim; i += 32) put(i, from[i]);
  };
  const T* heads = static_cast<const T*>(args.q.values) + at.row * args.q.row_stride;
#pragma unroll 2
  for (int head = threadIdx.x / 32; head < at.heads; head += kWarps) {
    rotate(heads + (at.first_head + head) * args.q.head_stride, [&](int i, T x) { q[head * q_pitch + i] = x; });
  }
  if (!at.joins) return;
  const int64_t to = token_at(args, cut, at, at.length);
  if (threadIdx.x / 32 == kWarps - 1) {
    rotate(static_cast<const T*>(args.k.values) + at.row * args.k.row_stride + at.kv_head * args.k.head_stride,
           [&](int i, T x) { new_k[i] = x, static_cast<T*>(args.k_pages)[to + i] = x; });
  }
  if (threadIdx.x / 32 == kWarps - 2) {
    const T* v = static_cast<const T*>(args.v.values) + at.row * args.v.row_stride + at.kv_head * args.v.head_stride;
    for (int i = lane; i < dim; i += 32) {
      new_v[i] = v[i], static_cast<T*>(args.v_pages)[to + i] = v[i];
    }
  }
}

// --- sums ------------------------------------------------------------------------------------------------------------

// A part's sums of a head are dim values, then the maximum and the sum of weights.
__device__ inline float* part_of(const PagedAttentionArgs& args, int64_t row, int head, int part) {
  return args.partial + ((row * args.heads + head) * args.parts + part) * (args.dim + 2);
}

template <typename T>
__device__ void sum_parts(const PagedAttentionArgs& args, const Place& at) {
  const int lane = threadIdx.x % 32, dim = static_cast<int>(args.dim);
  for (int head = threadIdx.x / 32; head < at.heads; head += kWarps) {
    for (int column = lane; column < dim; column += 32) {
      float max = -INFINITY, sum = 0.0f, value = 0.0f;
#pragma unroll 4
      for (int part = 0; part < at.used; ++part) {
        const float* from = part_of(args, at.row, at.first_head + head, part);
        const float part_max = __ldcg(from + dim), part_sum = __ldcg(from + dim + 1);
        const float part_value = __ldcg(from + column);
        const Weights weights(max, part_max);
        sum = sum * weights.first + part_sum * weights.second;
        value = value * weights.first + part_value * weights.second;
        max = weights.max;
      }
      T* out = static_cast<T*>(args.out) + (at.row * args.heads + at.first_head + head) * dim;
      out[column] = from_float<T>(value / sum);
    }
  }
}

// Of the warps of a block, for each head: the largest score, and the sum of weights relative to 2^max.
template <int kGroup>
struct WarpSums {
  float max[kWarps][kGroup], sum[kWarps][kGroup];
  bool is_last;
};

// Adds the warps' sums, in their order; the last block of a row's heads adds those of the parts.
// `value_of` gives the value of a warp, head and column in shared memory. All warps' sums must have been written.
template <typename T, int kGroup, typename ValueOf>
__device__ void sum_warps(const PagedAttentionArgs& args, const Cut& cut, const Place& at, WarpSums<kGroup>& warps,
                          const ValueOf& value_of) {
  const int lane = threadIdx.x % 32, dim = static_cast<int>(args.dim);
  __syncthreads();
  for (int head = threadIdx.x / 32; head < at.heads; head += kWarps) {
    float max = -INFINITY, sum = 0.0f, weight[kWarps];
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) max = fmaxf(max, warps.max[warp][head]);
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) {
      weight[warp] = exp2_approx_ftz(warps.max[warp][head] - max);
      sum += warps.sum[warp][head] * weight[warp];
    }
    T* out = static_cast<T*>(args.out) + (at.row * args.heads + at.first_head + head) * dim;
    float* part = at.used == 1 ? nullptr : part_of(args, at.row, at.first_head + head, at.part);
    for (int column = lane; column < dim; column += 32) {
      float value = 0.0f;
#pragma unroll
      for (int warp = 0; warp < kWarps; ++warp) value += value_of(warp, head, column) * weight[warp];
      if (at.used == 1) {
        out[column] = from_float<T>(value / sum);
      } else {
        part[column] = value;
        if (column == 0) part[dim] = max, part[dim + 1] = sum;
      }
    }
  }
  if (at.used == 1) return;
  __threadfence();
  __syncthreads();
  unsigned* counter = args.counters + at.row * cut.blocks + at.block;
  if (threadIdx.x == 0) {
    warps.is_last = atomicAdd(counter, 1) == static_cast<unsigned>(at.used) - 1;
    if (warps.is_last) *counter = 0;
  }
  __syncthreads();
  if (!warps.is_last) return;
  __threadfence();
  sum_parts<T>(args, at);
}

}  // namespace fastpeft::cuda::paged
