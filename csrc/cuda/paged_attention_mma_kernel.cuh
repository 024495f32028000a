// Attention over pages for 16-bit types: scores and sums on the tensor cores.
//
// Plan     A warp takes every fourth tile of 16 tokens of its block's part. It has three halves of tiles, keys or
//          values, under way in a ring of its own (cp.async), which needs no barrier between warps. Heads of q are the
//          rows of mma.m16n8k16, half of them empty: so scores come out as the operand by which the values, turned
//          over, are multiplied. Each warp keeps a softmax of its own over its tokens. The new token is put into its
//          tile by hand.
// Layout   a token of a half tile is kDim elements; its 16-byte packs change places with the token's number, so that
//          ldmatrix finds eight tokens in different banks. Columns beyond the head's and tokens beyond the part are
//          zero.
// Numerics q, k and v as they are stored, float32 scores and sums, weights rounded to T as FlashAttention does.
// Source   online softmax: Milakov and Gimelshein, arXiv 1805.02867; scores that stay in registers: Dao,
//          FlashAttention-2, arXiv 2307.08691.
#pragma once

#include "cuda/paged_attention_parts.cuh"

namespace fastpeft::cuda::paged {

constexpr int kTile = 16;     // tokens
constexpr int kSlots = 3;     // half tiles of a warp's ring
constexpr int kMmaGroup = 8;  // heads of q: the most that paged_attention_plan gives a block

template <int kDim>
struct MmaLayout {
  static constexpr int kSlotBytes = kTile * kDim * 2, kRingBytes = kSlots * kSlotBytes;
  static constexpr int kPitch = kDim + 8;  // of heads, in elements: eight lie in different banks
  static constexpr int ring = 0, q = kWarps * kRingBytes, new_k = q + kMmaGroup * kPitch * 2, new_v = new_k + kDim * 2,
                       end = new_v + kDim * 2;
  static_assert(kMmaGroup * kPitch * 4 <= kRingBytes);  // a warp's ring takes its sums at the end
};

template <typename T, int kDim>
__global__ void __launch_bounds__(kThreads, kDim > 128 ? 2 : 4)
    mma_kernel(const __grid_constant__ PagedAttentionArgs args, const __grid_constant__ Cut cut) {
  using L = MmaLayout<kDim>;
  constexpr int kPacks = kDim / 8, kSlabs = kDim / 16;
  extern __shared__ __align__(128) uint8_t shared[];
  __shared__ WarpSums<kMmaGroup> warps;
  let_next_kernel_start();
  wait_for_kernel_before();
  const Place at(args, cut, kMmaGroup);
  if (at.is_idle) write_zeros<T>(args, at);
  if (!at.has_work) return;

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, dim = static_cast<int>(args.dim);
  const int end = at.end + at.joins, tiles = (end - at.begin + kTile - 1) / kTile;
  uint8_t* ring = shared + L::ring + warp * L::kRingBytes;
  const auto pack_at = [](int token, int pack) { return token * (kDim * 2) + (pack ^ (token & 7)) * 16; };

  // Half tiles in the order of their use: keys of this warp's first tile, its values, keys of the next.
  int ahead_tile = warp, ahead_slot = 0;
  bool ahead_is_v = false;
  const auto fetch = [&] {
    const auto* pages = static_cast<const T*>(ahead_is_v ? args.v_pages : args.k_pages);
    const int first = at.begin + ahead_tile * kTile;
    const uint32_t slot = smem_address(ring + ahead_slot * L::kSlotBytes);
    if (ahead_tile < tiles) {
#pragma unroll 4
      for (int i = 0; i < kTile * kPacks / 32; ++i) {
        const int token = (32 * i + lane) / kPacks, pack = (32 * i + lane) % kPacks;
        const bool is_there = first + token < at.end && pack * 8 < dim;
        const T* from = is_there ? pages + token_at(args, cut, at, first + token) + pack * 8 : pages;
        copy_async_16(slot + pack_at(token, pack), from, is_there ? 16 : 0);
      }
    }
    commit_async();
    if (ahead_is_v) ahead_tile += kWarps;
    ahead_is_v = !ahead_is_v;
    ahead_slot = ahead_slot + 1 == kSlots ? 0 : ahead_slot + 1;
  };
#pragma unroll
  for (int i = 0; i < kSlots; ++i) fetch();

  T *q_shared = reinterpret_cast<T*>(shared + L::q), *new_k = reinterpret_cast<T*>(shared + L::new_k),
    *new_v = reinterpret_cast<T*>(shared + L::new_v);
  for (int i = threadIdx.x; i < kMmaGroup * L::kPitch; i += kThreads) {  // heads and columns that there are not
    if (i / L::kPitch >= at.heads || i % L::kPitch >= dim) q_shared[i] = from_float<T>(0.0f);
  }
  take_new_token<T>(args, cut, at, q_shared, L::kPitch, new_k, new_v);
  __syncthreads();
  uint32_t q[kSlabs][4];  // rows 8 to 15 are no heads
#pragma unroll
  for (int slab = 0; slab < kSlabs; ++slab) {
    const T* from = q_shared + lane / 4 * L::kPitch + slab * 16 + lane % 4 * 2;
    q[slab][0] = *reinterpret_cast<const uint32_t*>(from), q[slab][2] = *reinterpret_cast<const uint32_t*>(from + 8);
    q[slab][1] = q[slab][3] = 0;
  }

  float max = -INFINITY, sum = 0.0f;  // of head lane / 4; the sum over this lane's tokens
  float out[kSlabs][4] = {};          // columns lane / 4 (+ 8) of a slab, heads lane % 4 * 2 (+ 1)
  int slot = 0;
  // Waits for the next half tile, and puts the new token in if it has it.
  const auto arrived = [&](int tile, const T* token) {
    wait_async<kSlots - 1>();
    uint8_t* half = ring + slot * L::kSlotBytes;
    if (at.joins && tile == tiles - 1) {
      const int place = at.length - at.begin - tile * kTile;
      __syncwarp();  // the zeros of other lanes are there
      if (lane < kPacks && lane * 8 < dim) {
        *reinterpret_cast<uint4*>(half + pack_at(place, lane)) = reinterpret_cast<const uint4*>(token)[lane];
      }
    }
    __syncwarp();
    slot = slot + 1 == kSlots ? 0 : slot + 1;
    return smem_address(half);
  };
  const auto leave = [&] {  // once all lanes have read, the slot takes the next half tile
    __syncwarp();
    fetch();
  };
#pragma unroll 1
  for (int tile = warp; tile < tiles; tile += kWarps) {
    // Scores of heads lane / 4 and tokens lane % 4 * 2 (+ 1), of the tile's first and last eight.
    float scores[2][4] = {};
    {
      const uint32_t half = arrived(tile, new_k);
#pragma unroll
      for (int eight = 0; eight < 2; ++eight) {
#pragma unroll
        for (int slab = 0; slab < kSlabs; slab += 2) {
          uint32_t k[4];  // eight tokens by 32 columns
          load_matrices<false>(k, half + pack_at(eight * 8 + lane % 8, slab * 2 + lane / 8));
          mma_m16n8k16<T>(scores[eight], q[slab], k[0], k[1]);
          mma_m16n8k16<T>(scores[eight], q[slab + 1], k[2], k[3]);
        }
      }
    }
    leave();
    const int first = at.begin + tile * kTile + lane % 4 * 2;
    float tile_max = -INFINITY;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float& score = scores[i / 2][i % 2];
      score = first + i / 2 * 8 + i % 2 < end ? capped(score * cut.score_scale, args) : -INFINITY;
      tile_max = fmaxf(tile_max, score);
    }
    tile_max = fmaxf(tile_max, __shfl_xor_sync(~0u, tile_max, 1));
    tile_max = fmaxf(tile_max, __shfl_xor_sync(~0u, tile_max, 2));
    const float before = max;
    max = fmaxf(max, tile_max);  // of at least one token: no infinity
    const float factor = exp2_approx_ftz(before - max);
    sum *= factor;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float& score = scores[i / 2][i % 2];
      score = exp2_approx_ftz(score - max);
      sum += score;
    }
    const float even = __shfl_sync(~0u, factor, lane % 4 * 8), odd = __shfl_sync(~0u, factor, lane % 4 * 8 + 4);
#pragma unroll
    for (int slab = 0; slab < kSlabs; ++slab) {
      out[slab][0] *= even, out[slab][1] *= odd, out[slab][2] *= even, out[slab][3] *= odd;
    }
    const uint32_t weights[2] = {pack_pair<T>(scores[0][0], scores[0][1]), pack_pair<T>(scores[1][0], scores[1][1])};
    {
      const uint32_t half = arrived(tile, new_v);
#pragma unroll
      for (int slab = 0; slab < kSlabs; ++slab) {
        uint32_t v[4];  // 16 columns by 16 tokens
        load_matrices<true>(v, half + pack_at(lane / 16 * 8 + lane % 8, slab * 2 + lane / 8 % 2));
        mma_m16n8k16<T>(out[slab], v, weights[0], weights[1]);
      }
    }
    leave();
  }

  sum += __shfl_xor_sync(~0u, sum, 1);
  sum += __shfl_xor_sync(~0u, sum, 2);
  if (lane % 4 == 0) warps.max[warp][lane / 4] = max, warps.sum[warp][lane / 4] = sum;
  wait_async<0>();
  __syncwarp();
  float* sums = reinterpret_cast<float*>(ring);
#pragma unroll
  for (int slab = 0; slab < kSlabs; ++slab) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      sums[(lane % 4 * 2 + i % 2) * L::kPitch + slab * 16 + i / 2 * 8 + lane / 4] = out[slab][i];
    }
  }
  sum_warps<T>(args, cut, at, warps, [&](int of_warp, int of_head, int column) {
    return reinterpret_cast<const float*>(shared + L::ring + of_warp * L::kRingBytes)[of_head * L::kPitch + column];
  });
}

}  // namespace fastpeft::cuda::paged
