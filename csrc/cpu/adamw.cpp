// AdamW on the host: every tensor of the list in one parallel region.
#include "fastpeft/adamw.h"

#include <algorithm>
#include <vector>

#include "cpu/adamw_kernel.h"
#include "cpu/parallel.h"

namespace fastpeft::cpu {
namespace {

// Calls body(row, begin, end) over all rows on all threads. Elements are numbered through the rows, each rounded up to
// whole blocks, so that many small rows share the threads as one large one does and no block is parted.
template <typename Body>
void for_elements(const std::vector<AdamWRow>& rows, const Context& context, const Body& body) {
  std::vector<int64_t> starts{0};
  for (const AdamWRow& row : rows) starts.push_back(starts.back() + ceil_div(row.numel, kAdamWBlock) * kAdamWBlock);
  parallel_for(starts.back(), 1 << 13, context.threads, [&](int64_t begin, int64_t end) {
    size_t row = std::upper_bound(starts.begin(), starts.end(), begin) - starts.begin() - 1;
    for (; row < rows.size() && starts[row] < end; ++row) {
      const int64_t first = std::max(begin, starts[row]) - starts[row];
      const int64_t last = std::min(end - starts[row], rows[row].numel);
      if (first < last) body(row, first, last);
    }
  });
}

// Of all gradients of a list. Each chunk has its sum, and these are added in order: the threads change no bit.
template <typename G>
double squares_of(const std::vector<AdamWGradient>& list, const Context& context) {
  constexpr int64_t kChunk = 1 << 14;
  const SumSquares<G> sum_squares = choose_sum<G>(cpu_features());
  double sum = 0.0;
  std::vector<float> sums;
  for (const AdamWGradient& gradient : list) {
    sums.assign(ceil_div(gradient.numel, kChunk), 0.0f);
    parallel_for(std::ssize(sums), 1, context.threads, [&](int64_t begin, int64_t end) {
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        const int64_t first = chunk * kChunk;
        sums[chunk] =
            sum_squares(static_cast<const G*>(gradient.data) + first, std::min(kChunk, gradient.numel - first));
      }
    });
    for (const float s : sums) sum += s;
  }
  return sum;
}

// The dtypes that an optimizer takes.
template <typename Body>
void dispatch_trained(DType dtype, const Body& body) {
  dispatch(dtype, [&](auto zero) {
    if constexpr (std::is_same_v<decltype(zero), double>) {
      throw ArgumentError("adamw: float64 is not supported; use float32, float16 or bfloat16");
    } else {
      body(zero);
    }
  });
}

}  // namespace

void adamw_step(const AdamWStepArgs& args, const Context& context) {
  check_adamw(args);
  if (args.control->skip != 0) return;
  const AdamWList& list = *args.list;
  const AdamWRates rates = adamw_rates(args);
  const float grad_factor = args.control->grad_factor * rates.grad_sign;
  std::vector<AdamWFactors> factors;
  for (const AdamWTensor& tensor : list.tensors) factors.push_back(adamw_factors(adamw_schedule(args), tensor));
  dispatch_trained(list.param_dtype, [&](auto param_zero) {
    dispatch_trained(args.grad_dtype, [&](auto grad_zero) {
      using P = decltype(param_zero);
      using G = decltype(grad_zero);
      const AdamWUpdate<P, G> update = choose_update<P, G>(list.eight_bit, cpu_features());
      for_elements(list.rows, context, [&](size_t i, int64_t begin, int64_t end) {
        const AdamWRow& row = list.rows[i];
        const G* grad = static_cast<const G*>(args.grads[i]) + row.offset;
        update({row, grad, rates, factors[row.tensor], grad_factor, args.stochastic, begin, end});
      });
    });
  });
}

void adamw_norm(const AdamWNormArgs& args, const Context& context) {
  double sum = 0.0;
  for (const AdamWGradients& gradients : args.gradients) {
    dispatch_trained(gradients.dtype, [&](auto zero) { sum += squares_of<decltype(zero)>(gradients.list, context); });
  }
  args.control->sum = sum;
  finish_norm(*args.control, args.max_norm, args.grad_scale, args.found_inf);
}

}  // namespace fastpeft::cpu
