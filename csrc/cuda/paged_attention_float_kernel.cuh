// Attention over pages for float32.
//
// Layout   a token's row of a head is 16-byte packs
// Plan     kLanes lanes share a token, a pack each; so a warp reads 32 / kLanes tokens an instruction, and has two
//          rounds of kAtOnce of them under way, keys and values both: each lane copies what it will read itself into
//          shared memory (cp.async), which costs no registers and needs no barrier. Each group of lanes keeps a
//          softmax of its own; groups, then warps, then parts are summed at the end, in a fixed order.
// Source   online softmax: Milakov and Gimelshein, arXiv 1805.02867.
#pragma once

#include "cuda/paged_attention_parts.cuh"

namespace fastpeft::cuda::paged {

constexpr int kEach = 4;    // elements of a pack
constexpr int kRounds = 2;  // under way
template <int kGroup>
constexpr int kAtOnce = kGroup == 8 ? 2 : 4;

// Shared memory: the heads of q, the new key and value; then what is under way, and in its place the sums of warps.
template <int kGroup>
constexpr int new_token_floats(int dim) {
  return (kGroup + 2) * dim;
}
template <int kGroup>
constexpr int float_bytes(int dim) {
  const int under_way = kRounds * kAtOnce<kGroup> * 2 * kThreads * 16, sums = 4 * kWarps * kGroup * dim;
  return 4 * new_token_floats<kGroup>(dim) + (sums > under_way ? sums : under_way);
}

template <int kLanes, int kGroup>
__global__ void __launch_bounds__(kThreads, kGroup == 8 ? 2 : 4)
    float_kernel(const __grid_constant__ PagedAttentionArgs args, const __grid_constant__ Cut cut) {
  constexpr int kSide = 32 / kLanes;  // tokens side by side in a warp
  constexpr int kTokens = kAtOnce<kGroup>, kStride = kWarps * kSide;
  extern __shared__ __align__(16) float shared_floats[];
  __shared__ WarpSums<kGroup> warps;
  let_next_kernel_start();
  wait_for_kernel_before();
  const Place at(args, cut, kGroup);
  if (at.is_idle) write_zeros<float>(args, at);
  if (!at.has_work) return;

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, side = lane / kLanes, column = lane % kLanes * kEach;
  const int dim = static_cast<int>(args.dim), first_token = at.begin + warp * kSide + side;
  const auto is_token = [&](int round, int i) { return first_token + (round * kTokens + i) * kStride < at.end; };

  // Keys and values of a round, each lane its own packs.
  float* after_new_token = shared_floats + new_token_floats<kGroup>(dim);
  float4* under_way = reinterpret_cast<float4*>(after_new_token) + threadIdx.x;
  const auto slot = [&](int round, int i, int of_v) {
    return under_way + ((round % kRounds * kTokens + i) * 2 + of_v) * kThreads;
  };
  const auto fetch = [&](int round) {
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      if (is_token(round, i) && column < dim) {
        const int64_t from = token_at(args, cut, at, first_token + (round * kTokens + i) * kStride) + column;
        copy_async_16(smem_address(slot(round, i, 0)), static_cast<const float*>(args.k_pages) + from);
        copy_async_16(smem_address(slot(round, i, 1)), static_cast<const float*>(args.v_pages) + from);
      }
    }
    commit_async();
  };
#pragma unroll
  for (int round = 0; round < kRounds; ++round) fetch(round);

  float *q_shared = shared_floats, *new_k = q_shared + kGroup * dim, *new_v = new_k + dim;
  take_new_token<float>(args, cut, at, q_shared, dim, new_k, new_v);
  __syncthreads();
  const auto load = [&](bool wanted, const float4* from, float(&to)[kEach]) {
    const float4 v = wanted && column < dim ? *from : float4{};
    to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
  };
  float q[kGroup][kEach];
#pragma unroll
  for (int head = 0; head < kGroup; ++head) {
    load(head < at.heads, reinterpret_cast<const float4*>(q_shared + head * dim + column), q[head]);
#pragma unroll
    for (int i = 0; i < kEach; ++i) q[head][i] *= cut.score_scale;
  }

  float max[kGroup], sum[kGroup] = {}, out[kGroup][kEach] = {};
#pragma unroll
  for (int head = 0; head < kGroup; ++head) max[head] = -INFINITY;
  // The score of a token; in all lanes of a group.
  const auto score_of = [&](const float(&k)[kEach], int head) {
    float score = 0.0f;
#pragma unroll
    for (int j = 0; j < kEach; ++j) score += q[head][j] * k[j];
#pragma unroll
    for (int distance = kLanes / 2; distance > 0; distance /= 2) score += __shfl_xor_sync(~0u, score, distance);
    return capped(score, args);
  };
  // Makes room for scores up to `most`; what they are relative to.
  const auto raise = [&](int head, float most) {
    const Weights weights(max[head], most);
    max[head] = weights.max, sum[head] *= weights.first;
#pragma unroll
    for (int j = 0; j < kEach; ++j) out[head][j] *= weights.first;
    return weights.max == -INFINITY ? 0.0f : weights.max;
  };
  const int rounds = (at.end - at.begin + kStride * kTokens - 1) / (kStride * kTokens);
#pragma unroll 1
  for (int round = 0; round < rounds; ++round) {
    wait_async<kRounds - 1>();
    float scores[kTokens][kGroup];
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      float k[kEach];
      load(is_token(round, i), slot(round, i, 0), k);
#pragma unroll
      for (int head = 0; head < kGroup; ++head) {
        const float score = score_of(k, head);
        scores[i][head] = is_token(round, i) ? score : -INFINITY;
      }
    }
#pragma unroll
    for (int head = 0; head < kGroup; ++head) {
      float most = scores[0][head];
#pragma unroll
      for (int i = 1; i < kTokens; ++i) most = fmaxf(most, scores[i][head]);
      const float shift = raise(head, most);
#pragma unroll
      for (int i = 0; i < kTokens; ++i) {
        scores[i][head] = exp2_approx_ftz(scores[i][head] - shift);
        sum[head] += scores[i][head];
      }
    }
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      float v[kEach];
      load(is_token(round, i), slot(round, i, 1), v);
#pragma unroll
      for (int head = 0; head < kGroup; ++head) {
#pragma unroll
        for (int j = 0; j < kEach; ++j) out[head][j] += scores[i][head] * v[j];
      }
    }
    fetch(round + kRounds);
  }
  if (at.joins && warp == 0) {  // the new token, by the first group of lanes
    float k[kEach], v[kEach];
    load(true, reinterpret_cast<const float4*>(new_k + column), k);
    load(true, reinterpret_cast<const float4*>(new_v + column), v);
#pragma unroll
    for (int head = 0; head < kGroup; ++head) {
      const float score = score_of(k, head);
      const float shift = raise(head, side == 0 ? score : -INFINITY);
      const float weight = side == 0 ? exp2_approx_ftz(score - shift) : 0.0f;
      sum[head] += weight;
#pragma unroll
      for (int j = 0; j < kEach; ++j) out[head][j] += weight * v[j];
    }
  }
  wait_async<0>();
  __syncthreads();  // what was under way is read: its place takes the sums
  float* of_warps = after_new_token;
#pragma unroll
  for (int head = 0; head < kGroup; ++head) {
#pragma unroll
    for (int distance = kLanes; distance < 32; distance *= 2) {  // groups of lanes
      const Weights weights(max[head], __shfl_xor_sync(~0u, max[head], distance));
      const float other = __shfl_xor_sync(~0u, sum[head], distance);
      max[head] = weights.max;
      sum[head] = sum[head] * weights.first + other * weights.second;
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        const float other_value = __shfl_xor_sync(~0u, out[head][j], distance);
        out[head][j] = out[head][j] * weights.first + other_value * weights.second;
      }
    }
    if (lane == 0) warps.max[warp][head] = max[head], warps.sum[warp][head] = sum[head];
    if (side == 0 && column < dim) {
      *reinterpret_cast<float4*>(of_warps + (warp * kGroup + head) * dim + column) =
          make_float4(out[head][0], out[head][1], out[head][2], out[head][3]);
    }
  }
  sum_warps<float>(args, cut, at, warps, [&](int of_warp, int of_head, int at_column) {
    return of_warps[(of_warp * kGroup + of_head) * dim + at_column];
  });
}

}  // namespace fastpeft::cuda::paged
