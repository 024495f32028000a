// Counter-based dropout on the host: eight elements for each call of the generator.
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
  const int64_t rows = args.rows, columns = args.columns, column_blocks = ceil_div(columns, kMaskBlock);
  dispatch(args.dtype, [&](auto zero) {
    using T = decltype(zero);
    using Compute = std::conditional_t<std::is_same_v<T, double>, double, float>;
    const T* x = static_cast<const T*>(args.x);
    T* out = static_cast<T*>(args.out);
    const Compute scale = static_cast<Compute>(dropout_scale(args.p));
    // Sixteen columns of the four rows of a row call.
    const auto some = [&](int64_t row_call, int64_t first_column) {
      const int64_t first_row = row_call / kMaskRowCalls * kMaskBlock + row_call % kMaskRowCalls * 2;
      for (int64_t call = 0; call < kMaskColumnCalls; ++call) {
        if (first_column + call >= columns) return;
        const Philox4 random = philox(static_cast<uint32_t>(first_column / kMaskBlock * kMaskColumnCalls + call),
                                      static_cast<uint32_t>(row_call), args.seed);
        for (int i = 0; i < 8; ++i) {
          const int64_t row = first_row + i % 2 + i / 2 % 2 * 8, column = first_column + call + i / 4 * 8;
          if (row >= rows || column >= columns) continue;
          const bool keep = (kept_halves(random.words[i / 2], threshold) >> (15 + i % 2 * 16) & 1) != 0;
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
    parallel_for(ceil_div(rows, kMaskBlock) * kMaskRowCalls * column_blocks, 1 << 8, context.threads,
                 [&](int64_t begin, int64_t end) {
                   for (int64_t i = begin; i < end; ++i) some(i / column_blocks, i % column_blocks * kMaskBlock);
                 });
  });
}

}  // namespace fastpeft::cpu
