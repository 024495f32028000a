// Products of tokens sorted by expert with their experts' weights, of W[experts,n,k] in NF4, straight from its codes:
// y[i,n] = x[i,k] @ W[e]^T, and y[i,k] = x[i,n] @ W[e], for the tokens i of each expert e.
//
// Which sizes a kernel takes is decided by a pure function, nf4_experts_plan (cuda/nf4_experts_config.h).
#pragma once

#include "fastpeft/nf4.h"
#include "fastpeft/types.h"

namespace fastpeft {

struct NF4ExpertsArgs {
  NF4View w;        // of all experts
  bool transposed;  // the second product: the gradient by the input
  const void* x;    // [m, k], or [m, n] if transposed; row-major, of `dtype`
  const int* ends;  // [experts], on the device: where each expert's tokens end, ascending, the last m
  void* y;          // [m, n], or [m, k] if transposed; row-major, of `dtype`
  DType dtype;      // float16 or bfloat16
  int64_t m, experts, n, k;
  void* workspace;  // 16-byte aligned, of what the plan asks for
  int64_t workspace_bytes;
};

namespace cuda {
void nf4_linear_experts(const NF4ExpertsArgs& args, const Context& context);
}  // namespace cuda

}  // namespace fastpeft
