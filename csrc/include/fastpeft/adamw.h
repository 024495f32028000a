// One AdamW step over a whole list of tensors.
//
// For each element, in float32, with g negated if maximize:
//   m = m + (1 - beta1) * (g - m);   v = beta2 * v + (1 - beta2) * g * g
//   p = p * (1 - lr * weight_decay) - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
// State is float32 whatever the parameter; parameter and gradient may each be float32, float16 or bfloat16.
//
// Source   Loshchilov and Hutter, "Decoupled weight decay regularization", arXiv 1711.05101.
#pragma once

#include <vector>

#include "fastpeft/types.h"

namespace fastpeft {

struct AdamWTensor {
  void* param;
  const void* grad;
  float* exp_avg;
  float* exp_avg_sq;
  int64_t numel;
};

struct AdamWArgs {
  std::vector<AdamWTensor> tensors;
  DType param_dtype;
  DType grad_dtype;
  double lr, beta1, beta2, eps, weight_decay;
  int64_t step;  // 1 for the first
  bool maximize;
};

namespace cpu {
void adamw(const AdamWArgs& args, const Context& context);
}  // namespace cpu

namespace cuda {
void adamw(const AdamWArgs& args, const Context& context);
}  // namespace cuda

}  // namespace fastpeft
