// The AdamW update of one element, the same code for both backends.
#pragma once

#include <cmath>

#include "common/error.h"
#include "common/host_device.h"
#include "fastpeft/adamw.h"

namespace fastpeft {

// What a step multiplies by, worked out once in double.
struct AdamWFactors {
  float one_minus_beta1, beta2, one_minus_beta2, eps;
  float decay;       // 1 - lr * weight_decay
  float step_size;   // lr / (1 - beta1^t)
  float root_scale;  // 1 / sqrt(1 - beta2^t)
  float grad_sign;   // -1 when maximising
};

inline AdamWFactors adamw_factors(const AdamWArgs& args) {
  check(args.step >= 1, "adamw: step is ", args.step, "; the first step is 1");
  check(args.param_dtype != DType::kFloat64 && args.grad_dtype != DType::kFloat64,
        "adamw: float64 is not supported; use float32, float16 or bfloat16");
  const double t = static_cast<double>(args.step);
  return {static_cast<float>(1.0 - args.beta1),
          static_cast<float>(args.beta2),
          static_cast<float>(1.0 - args.beta2),
          static_cast<float>(args.eps),
          static_cast<float>(1.0 - args.lr * args.weight_decay),
          static_cast<float>(args.lr / (1.0 - std::pow(args.beta1, t))),
          static_cast<float>(1.0 / std::sqrt(1.0 - std::pow(args.beta2, t))),
          args.maximize ? -1.0f : 1.0f};
}

FASTPEFT_HOST_DEVICE inline float adamw_update(float p, float g, float& m, float& v, const AdamWFactors& f) {
  g *= f.grad_sign;
  m += f.one_minus_beta1 * (g - m);
  v = f.beta2 * v + f.one_minus_beta2 * g * g;
  return p * f.decay - f.step_size * m / (sqrtf(v) * f.root_scale + f.eps);
}

}  // namespace fastpeft
