// AdamW's kernels: what a step does to a list's table (fastpeft/adamw.h, common/adamw_table.h).
//
// Plan     prepare: a thread a tensor counts the step and works out its factors in double, unless the step is skipped.
//          update: a thread block of float32 state finds its row by a search of 32 ways and updates one chunk of 4096
//          elements, eight a thread, in 16-byte accesses. A block of 8-bit state keeps the maps in shared memory and
//          goes from chunk to chunk; a warp owns a block of 256 elements, whose largest magnitudes it finds by redux.
// Limits   Tensors off the 16-byte grid, and the ends of rows, go element by element, to the same bits.
#pragma once

#include "common/adamw_math.h"
#include "common/adamw_table.h"
#include "common/dynamic_map.h"
#include "cuda/device/numbers.cuh"

namespace fastpeft::cuda {

constexpr int kAdamWEach = 8;
constexpr int kAdamWThreads = kAdamWChunk / kAdamWEach;
static_assert(kAdamWBlock == 32 * kAdamWEach, "a warp owns a block of 8-bit state");

// Rows that are updated by one launch.
struct AdamWLaunch {
  const AdamWRow* rows;
  const uint32_t* first_chunks;
  const void* const* grads;
  const AdamWFactors* factors;
  const AdamWControl* control;
  AdamWRates rates;
  int row_count;
  uint32_t chunks;
};

// --- the table -------------------------------------------------------------------------------------------------------

template <int kBytes>
struct AdamWPayload {
  uint4 words[kBytes / 16];
};

template <int kBytes>
__global__ void adamw_write_kernel(const __grid_constant__ AdamWPayload<kBytes> payload, uint4* to, int words) {
  for (int i = threadIdx.x; i < words; i += blockDim.x) to[i] = payload.words[i];
}

static __global__ void adamw_prepare_kernel(AdamWSchedule schedule, const AdamWControl* control,
                                            const AdamWTensor* tensors, AdamWFactors* factors, int count) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < count && control->skip == 0) factors[i] = adamw_factors(schedule, tensors[i]);
}

// --- what updates share ----------------------------------------------------------------------------------------------

// The last row whose first chunk is not behind `chunk`. Every lane of a warp takes part.
__device__ inline int adamw_find_row(const AdamWLaunch& launch, uint32_t chunk) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  int low = 0, count = launch.row_count;
  while (count > 1) {
    const int stride = (count + 31) / 32;
    const bool behind = lane * stride >= count || launch.first_chunks[low + lane * stride] > chunk;
    const unsigned lanes_behind = __ballot_sync(~0u, behind);
    const int last = (lanes_behind == 0 ? 32 : __ffs(static_cast<int>(lanes_behind)) - 1) - 1;
    low += last * stride;
    count = min(stride, count - last * stride);
  }
  return low;
}

// Eight elements of a row, of which `valid` exist; `packed` when they can be moved 16 bytes at a time.
template <typename P, typename G>
struct AdamWEight {
  P* param;
  const G* grad;
  int64_t index;  // of the first, in its tensor
  int valid;
  bool packed;
};

template <typename P, typename G>
__device__ AdamWEight<P, G> adamw_eight(const AdamWRow& row, const void* grad, int64_t first, uintptr_t state_bits) {
  P* param = static_cast<P*>(row.param) + first;
  const G* gradient = static_cast<const G*>(grad) + row.offset + first;
  const int64_t left = row.numel - first;
  const int valid = left < 0 ? 0 : left < kAdamWEach ? static_cast<int>(left) : kAdamWEach;
  const uintptr_t bits = reinterpret_cast<uintptr_t>(param) | reinterpret_cast<uintptr_t>(gradient) | state_bits;
  return {param, gradient, row.offset + first, valid, valid == kAdamWEach && bits % 16 == 0};
}

template <typename P, bool kStochastic>
__device__ P adamw_rounded(float x, const Philox4& random, int place) {
  if constexpr (kStochastic) {
    return __ushort_as_bfloat16(round_stochastically(x, random, place));
  } else {
    return from_float<P>(x);
  }
}

// --- float32 state ---------------------------------------------------------------------------------------------------

template <typename P, typename G, bool kStochastic>
__global__ void __launch_bounds__(kAdamWThreads, 2) adamw_kernel(const __grid_constant__ AdamWLaunch launch) {
  if (launch.control->skip != 0) return;
  const float grad_factor = launch.control->grad_factor * launch.rates.grad_sign;
  const int row_number = adamw_find_row(launch, blockIdx.x);
  const AdamWRow& row = launch.rows[row_number];
  const int64_t first = static_cast<int64_t>(blockIdx.x - launch.first_chunks[row_number]) * kAdamWChunk +
                        static_cast<int64_t>(threadIdx.x) * kAdamWEach;
  if (first >= row.numel) return;
  float* exp_avg = static_cast<float*>(row.exp_avg) + first;
  float* exp_avg_sq = static_cast<float*>(row.exp_avg_sq) + first;
  const auto eight = adamw_eight<P, G>(row, launch.grads[row_number], first,
                                       reinterpret_cast<uintptr_t>(exp_avg) | reinterpret_cast<uintptr_t>(exp_avg_sq) |
                                           (kStochastic ? static_cast<uintptr_t>(row.offset % kAdamWEach) : 0));
  const AdamWFactors factors = launch.factors[row.tensor];

  if (eight.packed) {
    auto p = load_pack<P, kAdamWEach>(eight.param);
    const auto g = load_pack<G, kAdamWEach>(eight.grad);
    auto m = load_pack<float, kAdamWEach>(exp_avg);
    auto v = load_pack<float, kAdamWEach>(exp_avg_sq);
    Philox4 random{};
    if constexpr (kStochastic) random = rounding_bits(eight.index, factors.key);
#pragma unroll
    for (int i = 0; i < kAdamWEach; ++i) {
      adamw_moments(product(to_float(g.values[i]), grad_factor), m.values[i], v.values[i], launch.rates);
      const float x = adamw_update(to_float(p.values[i]), m.values[i], v.values[i], factors, launch.rates.eps);
      p.values[i] = adamw_rounded<P, kStochastic>(x, random, i);
    }
    store_pack(eight.param, p);
    store_pack(exp_avg, m);
    store_pack(exp_avg_sq, v);
  } else {
    for (int i = 0; i < eight.valid; ++i) {
      float m = exp_avg[i], v = exp_avg_sq[i];
      adamw_moments(product(to_float(eight.grad[i]), grad_factor), m, v, launch.rates);
      const float x = adamw_update(to_float(eight.param[i]), m, v, factors, launch.rates.eps);
      const int64_t index = eight.index + i;
      Philox4 random{};
      if constexpr (kStochastic) random = rounding_bits(index, factors.key);
      eight.param[i] = adamw_rounded<P, kStochastic>(x, random, static_cast<int>(index % kAdamWEach));
      exp_avg[i] = m, exp_avg_sq[i] = v;
    }
  }
}

// --- 8-bit state -----------------------------------------------------------------------------------------------------

struct AdamWMaps {
  DynamicMap<true> first;
  DynamicMap<false> second;
};
static_assert(sizeof(AdamWMaps) % 16 == 0);
static __device__ const AdamWMaps kAdamWMaps{};

__device__ inline float largest_of_warp(const float (&values)[kAdamWEach]) {
  unsigned bits = 0;  // magnitudes order as their bits do, NaN last
#pragma unroll
  for (int i = 0; i < kAdamWEach; ++i) bits = max(bits, __float_as_uint(values[i]) & 0x7fffffffu);
  return __uint_as_float(__reduce_max_sync(~0u, bits));
}

template <typename P, typename G, bool kStochastic>
__global__ void __launch_bounds__(kAdamWThreads, 2) adamw_8bit_kernel(const __grid_constant__ AdamWLaunch launch) {
  if (launch.control->skip != 0) return;
  __shared__ AdamWMaps maps;
  for (unsigned i = threadIdx.x; i < sizeof(maps) / 16; i += kAdamWThreads) {
    reinterpret_cast<uint4*>(&maps)[i] = reinterpret_cast<const uint4*>(&kAdamWMaps)[i];
  }
  __syncthreads();
  const float grad_factor = launch.control->grad_factor * launch.rates.grad_sign;

  for (uint32_t chunk = blockIdx.x; chunk < launch.chunks; chunk += gridDim.x) {
    const int row_number = adamw_find_row(launch, chunk);
    const AdamWRow& row = launch.rows[row_number];
    const int64_t block =
        static_cast<int64_t>(chunk - launch.first_chunks[row_number]) * (kAdamWChunk / kAdamWBlock) + threadIdx.x / 32;
    if (block * kAdamWBlock >= row.numel) continue;  // of the whole warp
    const int64_t first = block * kAdamWBlock + threadIdx.x % 32 * kAdamWEach;
    uint8_t* codes = static_cast<uint8_t*>(row.exp_avg) + first;
    uint8_t* codes_sq = static_cast<uint8_t*>(row.exp_avg_sq) + first;
    const auto eight =
        adamw_eight<P, G>(row, launch.grads[row_number], first,
                          (reinterpret_cast<uintptr_t>(codes) | reinterpret_cast<uintptr_t>(codes_sq)) % 8);
    const AdamWFactors factors = launch.factors[row.tensor];
    const float absmax = row.absmax[block], absmax_sq = row.absmax_sq[block];

    Pack<P, kAdamWEach> p{};
    Pack<G, kAdamWEach> g{};
    uint2 packed_codes{}, packed_codes_sq{};
    uint8_t(&code)[8] = reinterpret_cast<uint8_t(&)[8]>(packed_codes);
    uint8_t(&code_sq)[8] = reinterpret_cast<uint8_t(&)[8]>(packed_codes_sq);
    if (eight.packed) {
      p = load_pack<P, kAdamWEach>(eight.param);
      g = load_pack<G, kAdamWEach>(eight.grad);
      packed_codes = *reinterpret_cast<const uint2*>(codes);
      packed_codes_sq = *reinterpret_cast<const uint2*>(codes_sq);
    } else {
#pragma unroll
      for (int i = 0; i < kAdamWEach; ++i) {
        if (i < eight.valid) {
          p.values[i] = eight.param[i], g.values[i] = eight.grad[i], code[i] = codes[i], code_sq[i] = codes_sq[i];
        }
      }
    }
    Philox4 random{};
    if constexpr (kStochastic) random = rounding_bits(eight.index, factors.key);
    float m[kAdamWEach], v[kAdamWEach];
#pragma unroll
    for (int i = 0; i < kAdamWEach; ++i) {
      m[i] = i < eight.valid ? product(maps.first.values[code[i]], absmax) : 0.0f;
      v[i] = i < eight.valid ? product(maps.second.values[code_sq[i]], absmax_sq) : 0.0f;
      adamw_moments(product(to_float(g.values[i]), grad_factor), m[i], v[i], launch.rates);
      const float x = adamw_update<true>(to_float(p.values[i]), m[i], v[i], factors, launch.rates.eps);
      p.values[i] = adamw_rounded<P, kStochastic>(x, random, i);
    }
    if (eight.packed) {
      store_pack(eight.param, p);
    } else {
#pragma unroll
      for (int i = 0; i < kAdamWEach; ++i) {
        if (i < eight.valid) eight.param[i] = p.values[i];
      }
    }
    const float largest = largest_of_warp(m), largest_sq = largest_of_warp(v);
    const float scale = inverse_absmax(largest), scale_sq = inverse_absmax(largest_sq);
#pragma unroll
    for (int i = 0; i < kAdamWEach; ++i) {
      code[i] = static_cast<uint8_t>(signed_code(product(m[i], scale), maps.first.nearest, maps.first.midpoints));
      code_sq[i] = static_cast<uint8_t>(
          unsigned_code(product(v[i], scale_sq), v[i], maps.second.nearest, maps.second.midpoints));
    }
    if (threadIdx.x % 32 == 0) row.absmax[block] = largest, row.absmax_sq[block] = largest_sq;
    if (eight.packed) {
      *reinterpret_cast<uint2*>(codes) = packed_codes;
      *reinterpret_cast<uint2*>(codes_sq) = packed_codes_sq;
    } else {
#pragma unroll
      for (int i = 0; i < kAdamWEach; ++i) {
        if (i < eight.valid) codes[i] = code[i], codes_sq[i] = code_sq[i];
      }
    }
  }
}

}  // namespace fastpeft::cuda
