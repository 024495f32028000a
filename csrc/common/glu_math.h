// The gated activations of one element, the same formulas for both backends.
#pragma once

#include "common/error.h"
#include "common/host_device.h"
#include "fastpeft/glu.h"

namespace fastpeft {

template <typename Real>
struct Activation {
  Real value, slope;
};

template <typename Real>
struct Sigmoid {
  Real value, complement;  // complement = 1 - value, without the digits that the subtraction would cancel
};

template <typename Math, typename Real>
FASTPEFT_THIS_SIDE Sigmoid<Real> sigmoid(Real x) {
  const Real e = Math::exp(x < 0 ? x : -x);  // never overflows
  const Real large = Math::divide(Real(1), 1 + e), small = Math::divide(e, 1 + e);
  return x < 0 ? Sigmoid<Real>{small, large} : Sigmoid<Real>{large, small};
}

// Value and slope of the activation. Math gives exp, quotient and erf of Reals.
template <GluKind kKind, typename Math, typename Real>
FASTPEFT_THIS_SIDE Activation<Real> activation(Real x) {
  if constexpr (kKind == GluKind::kSilu) {
    const auto s = sigmoid<Math>(x);
    const Real e = Math::exp(x < 0 ? x : -x);  // as in sigmoid; x / (1 + exp(-x)) rounds once less than x * sigmoid(x)
    return {Math::divide(x < 0 ? x * e : x, 1 + e), s.value * (1 + x * s.complement)};
  } else if constexpr (kKind == GluKind::kGeluTanh) {
    // (1 + tanh(u)) / 2 is sigmoid(2 u), here with u = sqrt(2 / pi) * (x + 0.044715 x^3); no digits cancel.
    constexpr Real kRoot = Real(1.5957691216057308), kCubic = Real(0.044715);  // 2 sqrt(2 / pi)
    const Real square = x * x;
    const auto s = sigmoid<Math>(kRoot * x * (1 + kCubic * square));
    return {x * s.value, s.value + x * s.value * s.complement * kRoot * (1 + 3 * kCubic * square)};
  } else {
    constexpr Real kRootHalf = Real(0.7071067811865476), kDensity = Real(0.3989422804014327);  // 1 / sqrt(2 pi)
    const Real s = Real(0.5) * (1 + Math::erf(x * kRootHalf));
    return {x * s, s + x * kDensity * Math::exp(Real(-0.5) * x * x)};
  }
}

// Calls body with the kind as a constant: body(GluKindConstant<...>{}).
template <GluKind kKind>
struct GluKindConstant {
  static constexpr GluKind value = kKind;
};

template <typename Body>
void dispatch_kind(GluKind kind, const Body& body) {
  switch (kind) {
    case GluKind::kSilu: return body(GluKindConstant<GluKind::kSilu>{});
    case GluKind::kGeluTanh: return body(GluKindConstant<GluKind::kGeluTanh>{});
    case GluKind::kGelu: return body(GluKindConstant<GluKind::kGelu>{});
  }
  throw ArgumentError(concat("glu: unknown kind ", static_cast<int>(kind)));
}

}  // namespace fastpeft
