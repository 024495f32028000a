// y[m,n] = x[m,k] @ W[n,k]^T (+ bias) with W in NF4, straight from its codes.
//
// Which sizes a kernel takes is decided by a pure function, nf4_linear_plan (cuda/nf4_linear_config.h); for the others
// the caller decodes the weight into a workspace (nf4.h) and multiplies with the framework.
#pragma once

#include "fastpeft/nf4.h"
#include "fastpeft/types.h"

namespace fastpeft {

struct NF4LinearArgs {
  NF4View w;         // of an (n, k) weight
  const void* x;     // [m, k], row-major, of `dtype`
  const void* bias;  // [n], of `dtype`, or null
  void* y;           // [m, n], row-major, of `dtype`
  DType dtype;       // float16 or bfloat16
  int64_t m, n, k;
};

namespace cuda {
void nf4_linear(const NF4LinearArgs& args, const Context& context);
}  // namespace cuda

}  // namespace fastpeft
