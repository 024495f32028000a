// AdamW over a range of one row, in three variants that give the same bits: scalar, AVX2, AVX-512.
//
// The loops are plain and without branches; each variant is the same loop, vectorised by the compiler for its units.
// Nothing is fused (-ffp-contract=off), so that the width changes no bit. Built with -fno-math-errno, or the root would
// be a call (CMakeLists.txt).
#pragma once

#include <algorithm>

#include "common/adamw_math.h"
#include "common/dynamic_map.h"
#include "cpu/features.h"
#include "cpu/numbers.h"

namespace fastpeft::cpu {

struct AdamWRange {
  const AdamWRow& row;
  const void* grad;  // of the row's first element
  AdamWRates rates;
  AdamWFactors factors;
  float grad_factor;
  bool stochastic;
  int64_t begin, end;  // elements of the row; of 8-bit state, `begin` is a block's
};

// A map with its bins as 32-bit numbers, which can be gathered.
template <bool kSigned>
struct WideMap {
  float values[256], midpoints[256];
  int32_t nearest[kDynamicBins];

  constexpr WideMap() : values{}, midpoints{}, nearest{} {
    const DynamicMap<kSigned> map;
    std::copy(std::begin(map.values), std::end(map.values), values);
    std::copy(std::begin(map.midpoints), std::end(map.midpoints), midpoints);
    std::copy(std::begin(map.nearest), std::begin(map.nearest) + kDynamicBins, nearest);
  }
};
inline constexpr WideMap<true> kFirstMap;
inline constexpr WideMap<false> kSecondMap;

#define FASTPEFT_ALWAYS_INLINE [[gnu::always_inline]] inline

// Parameters that have been updated, rounded and stored.
template <typename P>
FASTPEFT_ALWAYS_INLINE void store_params(const AdamWRange& r, int64_t first, int64_t count, const float* updated) {
  P* param = static_cast<P*>(r.row.param) + first;
  if constexpr (std::is_same_v<P, BFloat16>) {
    if (r.stochastic) {
      for (int64_t i = 0; i < count; ++i) {
        const int64_t index = r.row.offset + first + i;
        param[i] = {round_stochastically(updated[i], rounding_bits(index, r.factors.key), static_cast<int>(index % 8))};
      }
      return;
    }
  }
  for (int64_t i = 0; i < count; ++i) param[i] = from_float<P>(updated[i]);
}

template <typename P, typename G>
FASTPEFT_ALWAYS_INLINE void update_floats(const AdamWRange& r) {
  constexpr int64_t kPiece = 512;
  alignas(64) float updated[kPiece];
  const AdamWRates rates = r.rates;
  const AdamWFactors factors = r.factors;
  const float grad_factor = r.grad_factor;
  for (int64_t first = r.begin; first < r.end; first += kPiece) {
    const int64_t count = std::min(kPiece, r.end - first);
    const P* __restrict param = static_cast<const P*>(r.row.param) + first;
    const G* __restrict grad = static_cast<const G*>(r.grad) + first;
    float* __restrict exp_avg = static_cast<float*>(r.row.exp_avg) + first;
    float* __restrict exp_avg_sq = static_cast<float*>(r.row.exp_avg_sq) + first;
    for (int64_t i = 0; i < count; ++i) {
      float m = exp_avg[i], v = exp_avg_sq[i];
      adamw_moments(to_float(grad[i]) * grad_factor, m, v, rates);
      exp_avg[i] = m, exp_avg_sq[i] = v;
      updated[i] = adamw_update(to_float(param[i]), m, v, factors, rates.eps);
    }
    store_params<P>(r, first, count, updated);
  }
}

FASTPEFT_ALWAYS_INLINE float largest_magnitude(const float* values, int64_t count) {
  int32_t bits = 0;  // magnitudes order as their bits do, NaN last
  for (int64_t i = 0; i < count; ++i) bits = std::max(bits, std::bit_cast<int32_t>(values[i]) & 0x7fffffff);
  return std::bit_cast<float>(bits);
}

template <typename P, typename G>
FASTPEFT_ALWAYS_INLINE void update_codes(const AdamWRange& r) {
  alignas(64) float updated[kAdamWBlock], m[kAdamWBlock], v[kAdamWBlock];
  const AdamWRates rates = r.rates;
  const AdamWFactors factors = r.factors;
  const float grad_factor = r.grad_factor;
  for (int64_t first = r.begin; first < r.end; first += kAdamWBlock) {
    const int64_t count = std::min(kAdamWBlock, r.end - first), block = first / kAdamWBlock;
    const P* __restrict param = static_cast<const P*>(r.row.param) + first;
    const G* __restrict grad = static_cast<const G*>(r.grad) + first;
    uint8_t* __restrict codes = static_cast<uint8_t*>(r.row.exp_avg) + first;
    uint8_t* __restrict codes_sq = static_cast<uint8_t*>(r.row.exp_avg_sq) + first;
    const float absmax = r.row.absmax[block], absmax_sq = r.row.absmax_sq[block];
    for (int64_t i = 0; i < count; ++i) {
      m[i] = kFirstMap.values[codes[i]] * absmax;
      v[i] = kSecondMap.values[codes_sq[i]] * absmax_sq;
    }
    for (int64_t i = 0; i < count; ++i) {
      adamw_moments(to_float(grad[i]) * grad_factor, m[i], v[i], rates);
      updated[i] = adamw_update(to_float(param[i]), m[i], v[i], factors, rates.eps);
    }
    store_params<P>(r, first, count, updated);
    const float largest = largest_magnitude(m, count), largest_sq = largest_magnitude(v, count);
    const float scale = inverse_absmax(largest), scale_sq = inverse_absmax(largest_sq);
    // By way of 32-bit numbers of its own: bytes might be parts of the maps, for all the compiler knows.
    alignas(64) int32_t found[kAdamWBlock], found_sq[kAdamWBlock];
    for (int64_t i = 0; i < count; ++i) found[i] = signed_code(m[i] * scale, kFirstMap.nearest, kFirstMap.midpoints);
    for (int64_t i = 0; i < count; ++i) {
      found_sq[i] = unsigned_code(v[i] * scale_sq, v[i], kSecondMap.nearest, kSecondMap.midpoints);
    }
    for (int64_t i = 0; i < count; ++i) codes[i] = static_cast<uint8_t>(found[i]);
    for (int64_t i = 0; i < count; ++i) codes_sq[i] = static_cast<uint8_t>(found_sq[i]);
    r.row.absmax[block] = largest, r.row.absmax_sq[block] = largest_sq;
  }
}

// Sixteen running sums, whatever the width, so that every variant adds in the same order.
template <typename G>
FASTPEFT_ALWAYS_INLINE float sum_squares(const G* data, int64_t count) {
  float sums[16] = {};
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) {
    for (int64_t j = 0; j < 16; ++j) sums[j] += to_float(data[i + j]) * to_float(data[i + j]);
  }
  for (; i < count; ++i) sums[i % 16] += to_float(data[i]) * to_float(data[i]);
  float sum = 0.0f;
  for (const float s : sums) sum += s;
  return sum;
}

// --- the variants ----------------------------------------------------------------------------------------------------

template <typename P, typename G>
using AdamWUpdate = void (*)(const AdamWRange&);
template <typename G>
using SumSquares = float (*)(const G*, int64_t);

#define FASTPEFT_ADAMW_VARIANT(name, target)                      \
  template <typename P, typename G>                               \
  target void update_floats_##name(const AdamWRange& r) {         \
    update_floats<P, G>(r);                                       \
  }                                                               \
  template <typename P, typename G>                               \
  target void update_codes_##name(const AdamWRange& r) {          \
    update_codes<P, G>(r);                                        \
  }                                                               \
  template <typename G>                                           \
  target float sum_squares_##name(const G* data, int64_t count) { \
    return sum_squares(data, count);                              \
  }

FASTPEFT_ADAMW_VARIANT(scalar, )
#if defined(__x86_64__)
FASTPEFT_ADAMW_VARIANT(avx2, __attribute__((target("avx2,fma,f16c"))))
FASTPEFT_ADAMW_VARIANT(avx512, __attribute__((target("avx512f,avx512bw,avx512vl,avx2,fma,f16c"))))
#endif

template <typename P, typename G>
AdamWUpdate<P, G> choose_update(bool eight_bit, [[maybe_unused]] const Features& features) {
#if defined(__x86_64__)
  if (features.avx512) return eight_bit ? update_codes_avx512<P, G> : update_floats_avx512<P, G>;
  if (features.avx2) return eight_bit ? update_codes_avx2<P, G> : update_floats_avx2<P, G>;
#endif
  return eight_bit ? update_codes_scalar<P, G> : update_floats_scalar<P, G>;
}

template <typename G>
SumSquares<G> choose_sum([[maybe_unused]] const Features& features) {
#if defined(__x86_64__)
  if (features.avx512) return sum_squares_avx512<G>;
  if (features.avx2) return sum_squares_avx2<G>;
#endif
  return sum_squares_scalar<G>;
}

}  // namespace fastpeft::cpu
