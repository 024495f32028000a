// Counter-based dropout on the host: four elements for each call of the generator.
#include "fastpeft/dropout.h"

#include <algorithm>
#include <type_traits>

#include "common/dropout_mask.h"
#include "cpu/numbers.h"
#include "cpu/parallel.h"

namespace fastpeft::cpu {

void dropout(const DropoutArgs& args, const Context& context) {
  check_dropout(args);
  const uint64_t threshold = dropout_threshold(args.p);
  dispatch(args.dtype, [&](auto zero) {
    using T = decltype(zero);
    using Compute = std::conditional_t<std::is_same_v<T, double>, double, float>;
    const T* x = static_cast<const T*>(args.x);
    T* out = static_cast<T*>(args.out);
    const Compute scale = static_cast<Compute>(1.0 / (1.0 - args.p));
    parallel_for(args.numel, 1 << 14, context.threads, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i += 4) {
        const Philox4 random = philox(static_cast<uint64_t>(i) / 4, args.seed);
        for (int64_t j = i; j < std::min(end, i + 4); ++j) {
          const Compute kept = random.words[j - i] >= threshold ? static_cast<Compute>(to_float(x[j])) * scale : 0;
          if constexpr (std::is_same_v<T, double>) {
            out[j] = kept;
          } else {
            out[j] = from_float<T>(kept);
          }
        }
      }
    });
  });
}

}  // namespace fastpeft::cpu
