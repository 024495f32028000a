// AdamW on the host: every tensor of the list in one parallel region.
#include "fastpeft/adamw.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "common/adamw_math.h"
#include "common/dynamic_map.h"
#include "cpu/numbers.h"
#include "cpu/parallel.h"

namespace fastpeft::cpu {
namespace {

constexpr int64_t kSumChunk = 1 << 14;
constexpr DynamicMap<true> kFirstMap;
constexpr DynamicMap<false> kSecondMap;

struct Row {
  const AdamWRow& row;
  const void* grad;  // of the row's first element
  AdamWRates rates;
  AdamWFactors factors;
  float grad_factor;
  bool stochastic;
};

template <typename P>
P rounded(float x, const Row& r, int64_t i) {
  if constexpr (std::is_same_v<P, BFloat16>) {
    const int64_t index = r.row.offset + i;
    if (r.stochastic) return {round_stochastically(x, rounding_bits(index, r.factors.key), index % 8)};
  }
  return from_float<P>(x);
}

template <typename P, typename G>
void update(const Row& r, int64_t begin, int64_t end) {
  P* param = static_cast<P*>(r.row.param);
  const G* grad = static_cast<const G*>(r.grad);
  float *exp_avg = static_cast<float*>(r.row.exp_avg), *exp_avg_sq = static_cast<float*>(r.row.exp_avg_sq);
  for (int64_t i = begin; i < end; ++i) {
    adamw_moments(to_float(grad[i]) * r.grad_factor, exp_avg[i], exp_avg_sq[i], r.rates);
    const float p = adamw_update(to_float(param[i]), exp_avg[i], exp_avg_sq[i], r.factors, r.rates.eps);
    param[i] = rounded<P>(p, r, i);
  }
}

float largest(const float* values, int64_t count) {
  uint32_t bits = 0;  // of magnitudes, which order as the values do, NaN last
  for (int64_t i = 0; i < count; ++i) bits = std::max(bits, std::bit_cast<uint32_t>(values[i]) & 0x7fffffff);
  return std::bit_cast<float>(bits);
}

template <typename P, typename G>
void update_8bit(const Row& r, int64_t begin, int64_t end) {
  P* param = static_cast<P*>(r.row.param);
  const G* grad = static_cast<const G*>(r.grad);
  uint8_t *codes = static_cast<uint8_t*>(r.row.exp_avg), *codes_sq = static_cast<uint8_t*>(r.row.exp_avg_sq);
  float m[kAdamWBlock], v[kAdamWBlock];
  for (int64_t first = begin; first < end; first += kAdamWBlock) {
    float &absmax = r.row.absmax[first / kAdamWBlock], &absmax_sq = r.row.absmax_sq[first / kAdamWBlock];
    const int64_t count = std::min(kAdamWBlock, end - first);
    for (int64_t i = 0; i < count; ++i) {
      m[i] = kFirstMap.value(codes[first + i]) * absmax;
      v[i] = kSecondMap.value(codes_sq[first + i]) * absmax_sq;
      adamw_moments(to_float(grad[first + i]) * r.grad_factor, m[i], v[i], r.rates);
      const float p = adamw_update(to_float(param[first + i]), m[i], v[i], r.factors, r.rates.eps);
      param[first + i] = rounded<P>(p, r, first + i);
    }
    absmax = largest(m, count), absmax_sq = largest(v, count);
    const float scale = inverse_absmax(absmax), scale_sq = inverse_absmax(absmax_sq);
    for (int64_t i = 0; i < count; ++i) {
      codes[first + i] = static_cast<uint8_t>(signed_code(m[i] * scale, kFirstMap.nearest, kFirstMap.midpoints));
      codes_sq[first + i] =
          static_cast<uint8_t>(unsigned_code(v[i] * scale_sq, v[i], kSecondMap.nearest, kSecondMap.midpoints));
    }
  }
}

// Calls body(row, begin, end) over all rows on all threads. Elements are numbered through the rows, each rounded up to
// whole blocks, so that many small rows share the threads as one large one does and no block is parted.
template <typename Body>
void for_elements(const std::vector<int64_t>& numels, const Context& context, const Body& body) {
  std::vector<int64_t> starts{0};
  for (const int64_t numel : numels) starts.push_back(starts.back() + ceil_div(numel, kAdamWBlock) * kAdamWBlock);
  parallel_for(starts.back(), 1 << 13, context.threads, [&](int64_t begin, int64_t end) {
    size_t row = std::upper_bound(starts.begin(), starts.end(), begin) - starts.begin() - 1;
    for (; row < numels.size() && starts[row] < end; ++row) {
      const int64_t first = std::max(begin, starts[row]) - starts[row];
      const int64_t last = std::min(end - starts[row], numels[row]);
      if (first < last) body(row, first, last);
    }
  });
}

}  // namespace

void adamw_step(const AdamWStepArgs& args, const Context& context) {
  check_adamw(args);
  if (args.control->skip != 0) return;
  const AdamWList& list = *args.list;
  AdamWRates rates = adamw_rates(args);
  const float grad_factor = args.control->grad_factor * rates.grad_sign;
  std::vector<AdamWFactors> factors;
  for (const AdamWTensor& tensor : list.tensors) factors.push_back(adamw_factors(adamw_schedule(args), tensor));
  std::vector<int64_t> numels;
  for (const AdamWRow& row : list.rows) numels.push_back(row.numel);
  dispatch(list.param_dtype, [&](auto param_zero) {
    dispatch(args.grad_dtype, [&](auto grad_zero) {
      using P = decltype(param_zero);
      using G = decltype(grad_zero);
      for_elements(numels, context, [&](size_t i, int64_t begin, int64_t end) {
        const AdamWRow& row = list.rows[i];
        const Row r{row,         static_cast<const G*>(args.grads[i]) + row.offset,
                    rates,       factors[row.tensor],
                    grad_factor, args.stochastic};
        (list.eight_bit ? update_8bit<P, G> : update<P, G>)(r, begin, end);
      });
    });
  });
}

void adamw_norm(const AdamWNormArgs& args, const Context& context) {
  double sum = 0.0;
  for (const AdamWGradients& gradients : args.gradients) {
    dispatch(gradients.dtype, [&](auto zero) {
      using G = decltype(zero);
      for (const AdamWGradient& gradient : gradients.list) {
        const int64_t chunks = ceil_div(gradient.numel, kSumChunk);
        std::vector<double> sums(chunks);
        parallel_for(chunks, 1, context.threads, [&](int64_t begin, int64_t end) {
          for (int64_t chunk = begin; chunk < end; ++chunk) {
            const G* data = static_cast<const G*>(gradient.data) + chunk * kSumChunk;
            const int64_t count = std::min(kSumChunk, gradient.numel - chunk * kSumChunk);
            float s = 0.0f;
            for (int64_t i = 0; i < count; ++i) s += static_cast<float>(to_float(data[i]) * to_float(data[i]));
            sums[chunk] = s;
          }
        });
        for (const double s : sums) sum += s;
      }
    });
  }
  args.control->sum = sum;
  finish_norm(*args.control, args.max_norm, args.grad_scale, args.found_inf);
}

}  // namespace fastpeft::cpu
