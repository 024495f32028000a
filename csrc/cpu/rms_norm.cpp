// RMSNorm on the host: rows share the threads; dweight is summed in as many parts whatever the number of threads.
#include "fastpeft/rms_norm.h"

#include <algorithm>

#include "common/rms_norm_checks.h"
#include "cpu/numbers.h"
#include "cpu/parallel.h"

namespace fastpeft::cpu {
namespace {

template <typename T>
ComputeType<T> rounded(ComputeType<T> x) {
  return to_float(from_compute<T>(x));
}

// Calls body with a value of the element type and one of the weight's.
template <typename Body>
void dispatch_both(const RmsNormShape& shape, const Body& body) {
  dispatch(shape.dtype, [&](auto zero) {
    if (shape.weight_dtype == shape.dtype) {
      body(zero, zero);
    } else {
      body(zero, float{});
    }
  });
}

// About 16 thousand elements a task.
int64_t row_grain(int64_t width) { return std::max<int64_t>(1, (1 << 14) / width); }

template <typename T, typename W>
void forward_row(const RmsNormArgs& args, int64_t row) {
  using Compute = ComputeType<T>;
  const int64_t width = args.shape.width;
  const W* weight = static_cast<const W*>(args.weight);
  T* y = static_cast<T*>(args.y) + row * width;
  const T* x = static_cast<const T*>(args.x) + row * args.x_stride;
  if (args.residual != nullptr) {
    const T* residual = static_cast<const T*>(args.residual) + row * args.residual_stride;
    T* h = static_cast<T*>(args.h) + row * width;
    for (int64_t i = 0; i < width; ++i) h[i] = from_compute<T>(to_float(x[i]) + to_float(residual[i]));
    x = h;
  }
  double sum = 0;  // one after the other, long rows would lose digits in float32
  for (int64_t i = 0; i < width; ++i) sum += to_float(x[i]) * to_float(x[i]);
  const Compute rstd = static_cast<Compute>(1 / std::sqrt(sum / static_cast<double>(width) + args.eps));
  static_cast<Compute*>(args.rstd)[row] = rstd;
  const Compute offset = static_cast<Compute>(args.shape.offset);
  for (int64_t i = 0; i < width; ++i) {
    Compute n = to_float(x[i]) * rstd;
    if (args.shape.cast_first) n = rounded<T>(n);
    y[i] = from_compute<T>(n * (static_cast<Compute>(to_float(weight[i])) + offset));
  }
}

template <typename T, typename W>
void backward_row(const RmsNormBackwardArgs& args, int64_t row, ComputeType<T>* dweight) {
  using Compute = ComputeType<T>;
  const int64_t width = args.shape.width;
  const W* weight = static_cast<const W*>(args.weight);
  const T* h = static_cast<const T*>(args.h) + row * args.h_stride;
  const T* dy = static_cast<const T*>(args.dy) + row * args.dy_stride;
  const T* dh = args.dh == nullptr ? nullptr : static_cast<const T*>(args.dh) + row * args.dh_stride;
  T* dx = static_cast<T*>(args.dx) + row * width;
  const Compute rstd = static_cast<const Compute*>(args.rstd)[row];
  const Compute offset = static_cast<Compute>(args.shape.offset);
  const auto scaled = [&](int64_t i) { return to_float(dy[i]) * (static_cast<Compute>(to_float(weight[i])) + offset); };
  double sum = 0;
  for (int64_t i = 0; i < width; ++i) sum += scaled(i) * (to_float(h[i]) * rstd);
  const Compute mean = static_cast<Compute>(sum / static_cast<double>(width));
  for (int64_t i = 0; i < width; ++i) {
    const Compute n = to_float(h[i]) * rstd;
    if (dweight != nullptr) dweight[i] += to_float(dy[i]) * (args.shape.cast_first ? rounded<T>(n) : n);
    const Compute from_elsewhere = dh == nullptr ? Compute{0} : to_float(dh[i]);
    dx[i] = from_compute<T>(rstd * (scaled(i) - n * mean) + from_elsewhere);
  }
}

}  // namespace

void rms_norm(const RmsNormArgs& args, const Context& context) {
  check_rms_norm(args.shape);
  dispatch_both(args.shape, [&](auto zero, auto weight_zero) {
    parallel_for(args.shape.rows, row_grain(args.shape.width), context.threads, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) forward_row<decltype(zero), decltype(weight_zero)>(args, row);
    });
  });
}

void rms_norm_backward(const RmsNormBackwardArgs& args, const Context& context) {
  check_rms_norm(args.shape);
  const int64_t rows = args.shape.rows, width = args.shape.width;
  dispatch_both(args.shape, [&](auto zero, auto weight_zero) {
    using T = decltype(zero);
    using W = decltype(weight_zero);
    using Compute = ComputeType<T>;
    if (args.dweight == nullptr) {
      parallel_for(rows, row_grain(width), context.threads, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) backward_row<T, W>(args, row, nullptr);
      });
      return;
    }
    Compute* partials = static_cast<Compute*>(args.partials);
    const int64_t each = ceil_div(rows, std::max<int64_t>(1, args.partial_rows));
    parallel_for(args.partial_rows, 1, context.threads, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) {
        std::fill_n(partials + part * width, width, Compute{0});
        for (int64_t row = part * each; row < std::min(rows, (part + 1) * each); ++row) {
          backward_row<T, W>(args, row, partials + part * width);
        }
      }
    });
    for (int64_t i = 0; i < width; ++i) {
      Compute sum = 0;
      for (int64_t part = 0; part < args.partial_rows; ++part) sum += partials[part * width + i];
      static_cast<W*>(args.dweight)[i] = from_compute<W>(static_cast<ComputeType<W>>(sum));
    }
  });
}

}  // namespace fastpeft::cpu
