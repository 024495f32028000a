// RMSNorm over the last dimension, with the residual add before it, and the gradients of both.
//
//   h = residual ? round(x + residual) : x;   rstd = 1 / sqrt(mean(h^2) + eps);   n = h * rstd
//   y = cast_first ? round(n) * (weight + offset) : n * (weight + offset), rounded to dtype
//   dx = dh + rstd * (g - n * mean(g * n)) with g = dy * (weight + offset);   dweight = sum over rows of dy * n
// Arithmetic is float32 (float64 for float64). cast_first is how Llama rounds; its dweight takes the rounded n.
//
// Source   Zhang and Sennrich, "Root mean square layer normalization", arXiv 1910.07467.
#pragma once

#include "fastpeft/types.h"

namespace fastpeft {

// Rows of `width` elements with stride 1; rows are contiguous where no stride is given. Strides are in elements.
struct RmsNormShape {
  int64_t rows, width;
  DType dtype;         // float64 on the CPU only
  DType weight_dtype;  // dtype, or float32
  double offset;
  bool cast_first;
};

struct RmsNormArgs {
  RmsNormShape shape;
  const void* x;
  int64_t x_stride;
  const void* residual;  // null: none
  int64_t residual_stride;
  const void* weight;  // [width]
  double eps;
  void* y;
  void* h;     // with residual only
  void* rstd;  // [rows], float32 (float64 for float64)
};

struct RmsNormBackwardArgs {
  RmsNormShape shape;
  const void* dy;
  int64_t dy_stride;
  const void* dh;  // gradient that h got elsewhere; null: none
  int64_t dh_stride;
  const void* h;  // x where there was no residual
  int64_t h_stride;
  const void* rstd;
  const void* weight;
  void* dx;
  void* dweight;         // [width], of weight_dtype; null: not wanted
  void* partials;        // [partial_rows, width], of rstd's dtype; with dweight only
  int64_t partial_rows;  // rms_norm_partial_rows
};

namespace cpu {
void rms_norm(const RmsNormArgs& args, const Context& context);
void rms_norm_backward(const RmsNormBackwardArgs& args, const Context& context);
}  // namespace cpu

namespace cuda {
void rms_norm(const RmsNormArgs& args, const Context& context);
void rms_norm_backward(const RmsNormBackwardArgs& args, const Context& context);
}  // namespace cuda

}  // namespace fastpeft
