// Products with W[n,k] in NF4, straight from its codes: y[m,n] = x[m,k] @ W^T (+ bias), and y[m,k] = x[m,n] @ W.
//
// Which sizes a kernel takes is decided by a pure function, nf4_linear_plan (cuda/nf4_linear_config.h); for the others
// the caller decodes the weight into a workspace (nf4.h) and multiplies with the framework.
#pragma once

#include "fastpeft/nf4.h"
#include "fastpeft/types.h"

namespace fastpeft {

// A low-rank adapter whose product joins that of the base: y += xa B^T, with B times the adapter's scale, and, if
// transposed, y += drop(xa A). Its matrices are of the dtype of x, their rank rounded up to a multiple of 8 with zeros.
struct NF4LinearAdapter {
  int64_t r = 0;                 // 0: none
  const void* xa = nullptr;      // [m, r]
  int64_t xa_pitch = 0;          // elements from one row of xa to the next
  const void* factor = nullptr;  // B times the scale, [n, r]; if transposed A, [r, k]
  double p = 0.0;                // of dropout, if transposed
  uint64_t seed = 0;
  bool add_to_y = false;  // y is added to: what was there, and the product, are both rounded
  bool early = false;     // the call before on this stream is the one that makes xa, by a kernel that lets others start
};

struct NF4LinearArgs {
  NF4View w;         // of an (n, k) weight
  bool transposed;   // the second product: the gradient by the input
  const void* x;     // [m, k], or [m, n] if transposed; row-major, of `dtype`
  const void* bias;  // [n], of `dtype`, or null; null if transposed
  void* y;           // [m, n], or [m, k] if transposed; row-major, of `dtype`
  DType dtype;       // float16 or bfloat16
  int64_t m, n, k;
  void* workspace;  // 16-byte aligned, of what the plan asks for
  int64_t workspace_bytes;
  unsigned* counters;  // as many as the plan asks for: zero, and zero again afterwards
  bool wgmma;          // false: as if the device had none
  NF4LinearAdapter adapter{};
};

namespace cuda {
void nf4_linear(const NF4LinearArgs& args, const Context& context);
}  // namespace cuda

}  // namespace fastpeft
