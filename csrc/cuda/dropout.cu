// Counter-based dropout on CUDA: a thread makes eight calls of the generator, for sixteen columns of four rows.
#include "fastpeft/dropout.h"

#include "common/dropout_mask.h"
#include "common/integer.h"
#include "cuda/device/dropout.cuh"
#include "cuda/device/launch.cuh"
#include "cuda/device/numbers.cuh"

namespace fastpeft::cuda {
namespace {

constexpr int kEach = 8;
constexpr int kThreads = 256;

template <typename T>
__global__ void __launch_bounds__(kThreads)
    dropout_kernel(const T* x, T* out, int64_t rows, int64_t columns, int64_t column_blocks, Mask mask, bool aligned) {
  const int64_t at = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  const int64_t row_call = at / column_blocks, column_block = at % column_blocks;
  const int64_t first_row = row_call / kMaskRowCalls * kMaskBlock + row_call % kMaskRowCalls * 2;
  if (first_row >= rows) return;
  uint32_t kept[kMaskColumnCalls][4];
#pragma unroll
  for (int call = 0; call < kMaskColumnCalls; ++call) {
    const Philox4 random = philox(static_cast<uint32_t>(column_block * kMaskColumnCalls + call),
                                  static_cast<uint32_t>(row_call), mask.seed);
#pragma unroll
    for (int word = 0; word < 4; ++word) kept[call][word] = kept_halves(random.words[word], mask.threshold_twice);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t row = first_row + i % 2 + i / 2 * 8;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t column = column_block * kMaskBlock + half * kEach;
      if (row >= rows || column >= columns) continue;
      const int64_t first = row * columns + column;
      const bool whole = aligned && column + kEach <= columns;
      Pack<T, kEach> pack;
      if (whole) {
        pack = load_pack<T, kEach>(x + first);
      } else {
#pragma unroll
        for (int c = 0; c < kEach; ++c) {
          pack.values[c] = from_float<T>(column + c < columns ? to_float(x[first + c]) : 0.0f);
        }
      }
#pragma unroll
      for (int c = 0; c < kEach; ++c) {
        const bool keep = (kept[c][half * 2 + i / 2] >> (15 + i % 2 * 16) & 1) != 0;
        pack.values[c] = from_float<T>(keep ? to_float(pack.values[c]) * mask.scale : 0.0f);
      }
      if (whole) {
        store_pack(out + first, pack);
      } else {
#pragma unroll
        for (int c = 0; c < kEach; ++c) {
          if (column + c < columns) out[first + c] = pack.values[c];
        }
      }
    }
  }
}

}  // namespace

void dropout(const DropoutArgs& args, const Context& context) {
  check_dropout(args);
  if (args.rows == 0 || args.columns == 0) return;
  dispatch("dropout", args.dtype, [&](auto zero) {
    using T = decltype(zero);
    const int64_t column_blocks = ceil_div(args.columns, kMaskBlock);
    const int64_t row_calls = ceil_div(args.rows, kMaskBlock) * kMaskRowCalls;
    launch([&] { return concat("dropout of ", args.rows, " x ", args.columns, " elements"); }, dropout_kernel<T>,
           cover(row_calls * column_blocks, kThreads, kThreads), context, static_cast<const T*>(args.x),
           static_cast<T*>(args.out), args.rows, args.columns, column_blocks, make_mask(args.p, args.seed),
           args.columns % kEach == 0 && is_aligned(args.x) && is_aligned(args.out));
  });
}

}  // namespace fastpeft::cuda
