// Counter-based dropout on CUDA: a thread makes four calls of the generator, for eight columns of eight rows.
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
    dropout_kernel(const T* x, T* out, int64_t rows, int64_t columns, int64_t column_eights, Mask mask, bool aligned) {
  const int64_t at = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  const int64_t row_call = at / column_eights, column = at % column_eights * kEach;
  if (mask_row(row_call, 0) >= rows) return;
  Philox4 calls[kEach / kMaskColumns];
#pragma unroll
  for (int i = 0; i < kEach / kMaskColumns; ++i) {
    calls[i] = philox(static_cast<uint32_t>(column / kMaskColumns + i), static_cast<uint32_t>(row_call), mask.keys);
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int64_t row = mask_row(row_call, i);
    if (row >= rows) return;
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
      const uint32_t keeps = kept_halves(mask_word(calls[c / kMaskColumns], i), mask.threshold_twice);
      const bool keep = (keeps >> (15 + c % kMaskColumns * 16) & 1) != 0;
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

}  // namespace

void dropout(const DropoutArgs& args, const Context& context) {
  check_dropout(args);
  if (args.rows == 0 || args.columns == 0) return;
  dispatch("dropout", args.dtype, [&](auto zero) {
    using T = decltype(zero);
    const int64_t column_eights = ceil_div(args.columns, kEach);
    const int64_t row_calls = ceil_div(args.rows, kMaskRows) * kMaskRowCalls;
    launch([&] { return concat("dropout of ", args.rows, " x ", args.columns, " elements"); }, dropout_kernel<T>,
           cover(row_calls * column_eights, kThreads, kThreads), context, static_cast<const T*>(args.x),
           static_cast<T*>(args.out), args.rows, args.columns, column_eights, make_mask(args.p, args.seed),
           args.columns % kEach == 0 && is_aligned(args.x) && is_aligned(args.out));
  });
}

}  // namespace fastpeft::cuda
