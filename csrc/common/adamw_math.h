// The AdamW update of one element and what it multiplies by, the same code for both backends.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>

#include "common/error.h"
#include "common/host_device.h"
#include "common/philox.h"
#include "fastpeft/adamw.h"

namespace fastpeft {

// Equal for all tensors of a step.
struct AdamWRates {
  float one_minus_beta1, beta2, one_minus_beta2, eps;
  float grad_sign;  // -1 when maximising
};

// What a step's factors of a tensor are worked out from, in double.
struct AdamWSchedule {
  double lr;
  const float* lr_address;
  double beta1, beta2, weight_decay;
  uint64_t seed;
};

// Of a tensor.
struct AdamWFactors {
  float decay;       // 1 - lr * weight_decay
  float step_size;   // lr / (1 - beta1^t)
  float root_scale;  // 1 / sqrt(1 - beta2^t)
  uint32_t unused;
  uint64_t key;  // of the random numbers that it is rounded by
};

inline AdamWRates adamw_rates(const AdamWStepArgs& args) {
  return {static_cast<float>(1.0 - args.beta1), static_cast<float>(args.beta2), static_cast<float>(1.0 - args.beta2),
          static_cast<float>(args.eps), args.maximize ? -1.0f : 1.0f};
}

inline AdamWSchedule adamw_schedule(const AdamWStepArgs& args) {
  return {args.lr, args.lr_address, args.beta1, args.beta2, args.weight_decay, args.seed};
}

// Spreads 64 bits: Steele et al., "Fast splittable pseudorandom number generators", OOPSLA 2014, figure 16.
FASTPEFT_HOST_DEVICE inline uint64_t spread(uint64_t x) {
  x += 0x9E3779B97F4A7C15;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EB;
  return x ^ (x >> 31);
}

// Counts the tensor's step where the list does, and gives the step's factors.
FASTPEFT_HOST_DEVICE inline AdamWFactors adamw_factors(const AdamWSchedule& schedule, const AdamWTensor& tensor) {
  const float step = *tensor.step + static_cast<float>(tensor.advance);
  if (tensor.advance != 0) *tensor.step = step;
  const double t = step, lr = schedule.lr_address == nullptr ? schedule.lr : *schedule.lr_address;
  return {static_cast<float>(1.0 - lr * schedule.weight_decay), static_cast<float>(lr / (1.0 - pow(schedule.beta1, t))),
          static_cast<float>(1.0 / sqrt(1.0 - pow(schedule.beta2, t))), 0,
          spread(spread(spread(schedule.seed) ^ static_cast<uint64_t>(step)) ^ static_cast<uint64_t>(tensor.number))};
}

// Written out, because what the compiler fuses would depend on where the update stands, and with it the bits: a tensor
// must come out the same however it is cut. The host fuses nothing.
FASTPEFT_HOST_DEVICE inline float product(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}
FASTPEFT_HOST_DEVICE inline float product_plus(float a, float b, float c) {
#ifdef __CUDA_ARCH__
  return __fmaf_rn(a, b, c);
#else
  return a * b + c;
#endif
}

// g comes with its factor and sign.
FASTPEFT_HOST_DEVICE inline void adamw_moments(float g, float& m, float& v, const AdamWRates& r) {
  m = product_plus(r.one_minus_beta1, g - m, m);
  v = product_plus(product(r.one_minus_beta2, g), g, product(r.beta2, v));
}

// kFast: root and quotient within two units in the last place, on the device; for 8-bit state, whose rounding hides it.
template <bool kFast = false>
FASTPEFT_HOST_DEVICE float adamw_update(float p, float m, float v, const AdamWFactors& f, float eps) {
  const float step = product(f.step_size, m);
#ifdef __CUDA_ARCH__
  if constexpr (kFast) {
    float root;
    asm("sqrt.approx.f32 %0, %1;" : "=f"(root) : "f"(v));
    return product_plus(p, f.decay, -__fdividef(step, product_plus(root, f.root_scale, eps)));
  }
#endif
  return product_plus(p, f.decay, -(step / product_plus(sqrtf(v), f.root_scale, eps)));
}

// --- stochastic rounding ---------------------------------------------------------------------------------------------

// Eight elements of a tensor, from one whose index is a multiple of 8, share a call of the generator.
FASTPEFT_HOST_DEVICE inline Philox4 rounding_bits(int64_t index, uint64_t key) {
  const uint64_t group = static_cast<uint64_t>(index) >> 3;
  return philox(static_cast<uint32_t>(group), static_cast<uint32_t>(group >> 32), philox_keys(key));
}

// Bits of the bfloat16 below or above x, with the probability of its distance to the other.
FASTPEFT_HOST_DEVICE inline uint16_t round_stochastically(float x, const Philox4& random, int place) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t* words = random.words;  // chosen without an index, which would put them into memory
  const uint32_t word = place < 4 ? place < 2 ? words[0] : words[1] : place < 6 ? words[2] : words[3];
  const uint32_t added = word >> (place % 2 * 16) & 0xffff;
  const bool finite = (bits & 0x7f800000) != 0x7f800000;
  const uint32_t quiet = (bits & 0x007fffff) != 0 ? 0x00400000 : 0;
  return static_cast<uint16_t>((finite ? bits + added : bits | quiet) >> 16);
}

// --- the norm --------------------------------------------------------------------------------------------------------

// Fills the control from the sum of squares of all gradients as they came.
FASTPEFT_HOST_DEVICE inline void finish_norm(AdamWControl& control, double max_norm, const float* grad_scale,
                                             const float* found_inf) {
  const double inverse_scale = grad_scale == nullptr ? 1.0 : 1.0 / static_cast<double>(*grad_scale);
  const double norm = sqrt(control.sum) * inverse_scale;
  const bool skip = !(norm <= 1.7e308) || (found_inf != nullptr && *found_inf != 0.0f);
  const double clip = max_norm / (norm + 1e-6);  // torch.nn.utils.clip_grad_norm_
  control.grad_norm = static_cast<float>(norm);
  control.grad_factor = static_cast<float>((clip < 1.0 ? clip : 1.0) * inverse_scale);
  control.skip = skip ? 1 : 0;
  control.skipped += control.skip;
}

// --- checks ----------------------------------------------------------------------------------------------------------

inline void check_adamw(const AdamWStepArgs& args) {
  const AdamWList& list = *args.list;
  check(list.param_dtype != DType::kFloat64 && args.grad_dtype != DType::kFloat64,
        "adamw: float64 is not supported; use float32, float16 or bfloat16");
  check(args.grads.size() == list.given, "adamw: got ", args.grads.size(), " gradients for ", list.given, " tensors");
  check(!args.stochastic || list.param_dtype == DType::kBFloat16,
        "adamw: stochastic rounding is for bfloat16 parameters alone");
}

inline int64_t adamw_item_bytes(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

}  // namespace fastpeft
