// Rotary position embedding of queries and keys in one pass, and its gradient.
//
// With half = rotary / 2, for i < half of each head:
//   out[i]        = x[i] * cos[i] - x[i + half] * sin[i]
//   out[i + half] = x[i + half] * cos[i + half] + x[i] * sin[i + half]
// Elements from `rotary` on pass through. The gradient is the transpose of that map; where both halves of the angles
// are equal, it is the rotation by the opposite angle. Arithmetic is float32 (float64 for float64), with one rounding.
//
// Source   Su et al., "RoFormer", arXiv 2104.09864; the halves that rotate are those of transformers.
#pragma once

#include "fastpeft/types.h"

namespace fastpeft {

// [batch, heads, tokens, dim] with any strides, in elements, but 1 for the last.
struct RopeTensor {
  const void* in;
  void* out;
  int64_t heads;
  int64_t in_batch_stride, in_head_stride, in_token_stride;
  int64_t out_batch_stride, out_head_stride, out_token_stride;
};

// [batch, tokens, rotary]; the batch stride is 0 where all samples share one.
struct RopeAngles {
  const void* values;
  int64_t batch_stride, token_stride;
};

struct RopeArgs {
  RopeTensor q, k;
  RopeAngles cos, sin;
  DType dtype;        // float64 on the CPU only
  DType angle_dtype;  // dtype, or float32
  int64_t batch, tokens, dim, rotary;
  bool backward;  // in are the gradients of the output, out those of the input
};

namespace cpu {
void rope(const RopeArgs& args, const Context& context);
}  // namespace cpu

namespace cuda {
void rope(const RopeArgs& args, const Context& context);
}  // namespace cuda

}  // namespace fastpeft
