// What a logit and a target count for in the loss, worked out once a call; shared by both backends.
#pragma once

#include "common/error.h"
#include "common/host_device.h"
#include "fastpeft/cross_entropy.h"

namespace fastpeft {

template <typename Real>
struct LossFactors {
  Real scale;
  Real cap, inverse_cap;  // 0 for none
  Real on_target;         // 1 - label_smoothing
  Real everywhere;        // label_smoothing / v
};

template <typename Real>
LossFactors<Real> loss_factors(const LogitRows& x) {
  return {static_cast<Real>(x.logit_scale), static_cast<Real>(x.softcap),
          static_cast<Real>(x.softcap > 0.0 ? 1.0 / x.softcap : 0.0), static_cast<Real>(1.0 - x.label_smoothing),
          static_cast<Real>(x.label_smoothing / static_cast<double>(x.v))};
}

inline void check_logit_rows(const char* function, const LogitRows& x) {
  check(x.rows >= 0 && x.v >= 1, function, ": logits are (", x.rows, ", ", x.v, "); at least one column is needed");
  check(x.stride >= x.v, function, ": rows are ", x.stride, " apart, closer than their ", x.v, " columns");
  check(x.label_smoothing >= 0.0 && x.label_smoothing <= 1.0, function, ": label_smoothing is ", x.label_smoothing,
        "; it must be from 0 to 1");
  check(x.softcap >= 0.0, function, ": softcap is ", x.softcap, "; it must be positive, or 0 for none");
}

// 1 without a divisor; 0 where it is 0, as then there is nothing to divide.
template <typename Real>
FASTPEFT_HOST_DEVICE inline Real reciprocal_or_zero(const Real* divisor) {
  if (divisor == nullptr) return Real{1};
  return *divisor == Real{0} ? Real{0} : Real{1} / *divisor;
}

}  // namespace fastpeft
