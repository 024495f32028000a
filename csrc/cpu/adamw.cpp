// AdamW on the host: every tensor of the list in one parallel region.
#include "fastpeft/adamw.h"

#include <algorithm>
#include <vector>

#include "common/adamw_math.h"
#include "cpu/numbers.h"
#include "cpu/parallel.h"

namespace fastpeft::cpu {
namespace {

template <typename P, typename G>
void update(const AdamWTensor& tensor, int64_t begin, int64_t end, const AdamWFactors& factors) {
  P* param = static_cast<P*>(tensor.param);
  const G* grad = static_cast<const G*>(tensor.grad);
  for (int64_t i = begin; i < end; ++i) {
    const float p = static_cast<float>(to_float(param[i])), g = static_cast<float>(to_float(grad[i]));
    param[i] = from_float<P>(adamw_update(p, g, tensor.exp_avg[i], tensor.exp_avg_sq[i], factors));
  }
}

}  // namespace

void adamw(const AdamWArgs& args, const Context& context) {
  const AdamWFactors factors = adamw_factors(args);
  // Elements are numbered through all tensors, so that many small ones share the threads as one large one does.
  std::vector<int64_t> starts{0};
  for (const AdamWTensor& tensor : args.tensors) starts.push_back(starts.back() + tensor.numel);
  dispatch(args.param_dtype, [&](auto param_zero) {
    dispatch(args.grad_dtype, [&](auto grad_zero) {
      using P = decltype(param_zero);
      using G = decltype(grad_zero);
      parallel_for(starts.back(), 1 << 13, context.threads, [&](int64_t begin, int64_t end) {
        size_t t = std::upper_bound(starts.begin(), starts.end(), begin) - starts.begin() - 1;
        for (; t < args.tensors.size() && starts[t] < end; ++t) {
          const int64_t first = std::max(begin, starts[t]) - starts[t];
          const int64_t last = std::min(end, starts[t + 1]) - starts[t];
          if (first < last) update<P, G>(args.tensors[t], first, last, factors);
        }
      });
    });
  });
}

}  // namespace fastpeft::cpu
