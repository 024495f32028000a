// Gated activations: out = act(gate) * up, and the gradients dgate = dy * up * act'(gate), dup = dy * act(gate).
//
// act is SiLU (SwiGLU), or GELU by its tanh approximation or by the error function (GeGLU). Arithmetic is float32
// (float64 for float64), with one rounding: act(gate) is not rounded before the product.
//
// Source   Shazeer, "GLU variants improve transformer", arXiv 2002.05202.
#pragma once

#include "fastpeft/types.h"

namespace fastpeft {

// Numbers are part of the Python binding (fastpeft/ops/glu.py): append, never renumber.
enum class GluKind : int { kSilu = 0, kGeluTanh = 1, kGelu = 2 };

struct GluShape {
  int64_t rows, width;  // strides between rows are in elements
  DType dtype;          // float64 on the CPU only
  GluKind kind;
};

struct GluArgs {
  GluShape shape;
  const void* gate;
  const void* up;
  void* out;
  int64_t gate_stride, up_stride, out_stride;
};

struct GluBackwardArgs {
  GluShape shape;
  const void* dy;
  const void* gate;
  const void* up;
  void* dgate;
  void* dup;
  int64_t dy_stride, gate_stride, up_stride, dgate_stride, dup_stride;
};

namespace cpu {
void glu(const GluArgs& args, const Context& context);
void glu_backward(const GluBackwardArgs& args, const Context& context);
}  // namespace cpu

namespace cuda {
void glu(const GluArgs& args, const Context& context);
void glu_backward(const GluBackwardArgs& args, const Context& context);
}  // namespace cuda

}  // namespace fastpeft
