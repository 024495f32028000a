// Counter-based dropout on the host: sixteen elements for each call of the generator.
#include "fastpeft/dropout.h"

#include <algorithm>
#include <type_traits>

#include "common/dropout_mask.h"
#include "common/integer.h"
#include "cpu/numbers.h"
#include "cpu/parallel.h"

namespace fastpeft::cpu {

void dropout(const DropoutArgs& args, const Context& context) {
  check_dropout(args);
  const uint32_t threshold = dropout_threshold(args.p) * 0x10001u;
  const PhiloxKeys keys = philox_keys(args.seed);
  const int64_t rows = args.rows, columns = args.columns, column_calls = ceil_div(columns, kMaskColumns);
  dispatch(args.dtype, [&](auto zero) {
    using T = decltype(zero);
    using Compute = std::conditional_t<std::is_same_v<T, double>, double, float>;
    const T* x = static_cast<const T*>(args.x);
    T* out = static_cast<T*>(args.out);
    const Compute scale = static_cast<Compute>(dropout_scale(args.p));
    // Both columns of a call, of its eight rows.
    const auto some = [&](int64_t row_call, int64_t column_call) {
      const Philox4 random = philox(static_cast<uint32_t>(column_call), static_cast<uint32_t>(row_call), keys);
      for (int i = 0; i < 8; ++i) {
        const int64_t row = mask_row(row_call, i);
        if (row >= rows) return;
        const uint32_t keeps = kept_halves(mask_word(random, i), threshold);
        for (int half = 0; half < kMaskColumns; ++half) {
          const int64_t column = column_call * kMaskColumns + half;
          if (column >= columns) continue;
          const bool keep = (keeps >> (15 + half * 16) & 1) != 0;
          const int64_t at = row * columns + column;
          const Compute kept = keep ? static_cast<Compute>(to_float(x[at])) * scale : 0;
          if constexpr (std::is_same_v<T, double>) {
            out[at] = kept;
          } else {
            out[at] = from_float<T>(kept);
          }
        }
      }
    };
    parallel_for(ceil_div(rows, kMaskRows) * kMaskRowCalls * column_calls, 1 << 11, context.threads,
                 [&](int64_t begin, int64_t end) {
                   for (int64_t i = begin; i < end; ++i) some(i / column_calls, i % column_calls);
                 });
  });
}

}  // namespace fastpeft::cpu
