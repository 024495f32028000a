// Cross-entropy of rows of logits on the host: a thread takes whole rows, in blocks that stay in registers and L1.
#include "fastpeft/cross_entropy.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <type_traits>

#include "common/cross_entropy_math.h"
#include "cpu/numbers.h"
#include "cpu/parallel.h"

namespace fastpeft::cpu {
namespace {

constexpr int kBlock = 64;

template <typename T>
using Real = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename Real>
constexpr Real kInfinity = std::numeric_limits<Real>::infinity();

// --- exp -------------------------------------------------------------------------------------------------------------

inline double exp_of(double x) { return std::exp(x); }

// For x <= 0 (a little above by rounding), within 2 units in the last place; without a branch or a call, so that loops
// of it are vectorised. x = n log 2 + r; exp(r) by its Taylor series; adding 1.5 * 2^23 rounds to an integer. Below -87
// it is 0, masked out because a comparison of floats counts as control flow; a NaN stays one.
inline float exp_of(float x) {
  constexpr float kRound = 12582912.0f;
  const float shifted = x * 1.44269504f + kRound;
  const float n = shifted - kRound;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float e = 1.0f / 5040.0f;
  e = e * r + 1.0f / 720.0f;
  e = e * r + 1.0f / 120.0f;
  e = e * r + 1.0f / 24.0f;
  e = e * r + 1.0f / 6.0f;
  e = e * r + 0.5f;
  e = e * r + 1.0f;
  e = e * r + 1.0f;
  const uint32_t power = (std::bit_cast<uint32_t>(shifted) - std::bit_cast<uint32_t>(kRound) + 127) << 23;
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t far_below = (bits >= 0xc2ae0000u) & (bits <= 0xff800000u);  // -87 to -inf
  return std::bit_cast<float>(std::bit_cast<uint32_t>(e * std::bit_cast<float>(power)) & (far_below - 1));
}

// --- rows ------------------------------------------------------------------------------------------------------------

// One rounding; from_float() is of floats alone.
template <typename T>
T rounded(Real<T> x) {
  if constexpr (std::is_same_v<T, double>) {
    return x;
  } else {
    return from_float<T>(x);
  }
}

template <typename Real>
Real scaled(Real x, const LossFactors<Real>& f) {
  if (f.cap > 0) x = f.cap * std::tanh(x * f.inverse_cap);
  return f.scale * x;
}

// Calls body(z, first, count) for blocks of scaled logits; a short block is filled with -inf.
template <typename T, typename Body>
void each_block(const T* x, int64_t v, const LossFactors<Real<T>>& f, const Body& body) {
  alignas(64) Real<T> z[kBlock];
  for (int64_t first = 0; first < v; first += kBlock) {
    const int count = static_cast<int>(std::min<int64_t>(kBlock, v - first));
    if (count == kBlock) {
      for (int i = 0; i < kBlock; ++i) z[i] = to_float(x[first + i]);
    } else {
      for (int i = 0; i < kBlock; ++i) z[i] = i < count ? to_float(x[first + i]) : -kInfinity<Real<T>>;
    }
    if (f.cap > 0 || f.scale != 1) {
      for (int i = 0; i < count; ++i) z[i] = scaled(z[i], f);
    }
    body(z, first, count);
  }
}

// With p_j = exp(z_j - shift) * norm: a rounded lse as the shift would put its error into every p_j.
template <typename T>
void write_gradient(T* x, int64_t v, int64_t target, Real<T> shift, Real<T> norm, Real<T> row_scale,
                    const LossFactors<Real<T>>& f) {
  each_block(x, v, f, [&](Real<T>* z, int64_t first, int count) {
    Real<T> d[kBlock];
    for (int i = 0; i < kBlock; ++i) d[i] = exp_of(z[i] - shift) * norm - f.everywhere;
    if (target >= first && target < first + count) d[target - first] -= f.on_target;
    for (int i = 0; i < kBlock; ++i) d[i] *= f.scale * row_scale;
    if (f.cap > 0) {
      for (int i = 0; i < count; ++i) {
        const Real<T> t = std::tanh(to_float(x[first + i]) * f.inverse_cap);
        d[i] *= 1 - t * t;
      }
    }
    for (int i = 0; i < count; ++i) x[first + i] = rounded<T>(d[i]);
  });
}

template <typename T>
struct Row {
  Real<T> loss, lse, entropy;
  Real<T> max, norm;  // p_j = exp(z_j - max) * norm
};

template <typename T>
Row<T> loss_of(const T* x, int64_t v, int64_t target, bool entropy, const LossFactors<Real<T>>& f) {
  using R = Real<T>;
  constexpr int kLanes = 16;
  R maxima[kLanes];
  std::fill_n(maxima, kLanes, -kInfinity<R>);
  each_block(x, v, f, [&](const R* z, int64_t, int) {
    for (int i = 0; i < kBlock; i += kLanes) {
      for (int lane = 0; lane < kLanes; ++lane) maxima[lane] = maxima[lane] < z[i + lane] ? z[i + lane] : maxima[lane];
    }
  });
  const R max = *std::max_element(maxima, maxima + kLanes);

  R sums[kLanes] = {};
  double plain = 0, weighted = 0;
  each_block(x, v, f, [&](const R* z, int64_t, int count) {
    R e[kBlock];
    for (int i = 0; i < kBlock; ++i) e[i] = exp_of(z[i] - max);
    for (int i = 0; i < kBlock; i += kLanes) {
      for (int lane = 0; lane < kLanes; ++lane) sums[lane] += e[i + lane];
    }
    if (f.everywhere > 0) {
      for (int i = 0; i < count; ++i) plain += z[i];
    }
    if (entropy) {
      for (int i = 0; i < count; ++i) weighted += e[i] == 0 ? 0 : static_cast<double>(e[i]) * z[i];
    }
  });
  double sum = 0;
  for (int lane = 0; lane < kLanes; ++lane) sum += sums[lane];

  const R nan = std::numeric_limits<R>::quiet_NaN();
  Row<T> row{};
  row.max = max, row.norm = static_cast<R>(1 / sum);
  row.lse = max + static_cast<R>(std::log(sum));
  row.entropy = static_cast<R>(row.lse - weighted / sum);
  row.loss = nan;
  if (target >= 0 && target < v) row.loss = row.lse - f.on_target * scaled<R>(to_float(x[target]), f);
  if (f.everywhere > 0) row.loss -= static_cast<R>(f.everywhere * plain);
  return row;
}

template <typename T>
T* row_at(const LogitRows& x, int64_t row) {
  return static_cast<T*>(x.logits) + row * x.stride;
}

}  // namespace

void cross_entropy(const CrossEntropyArgs& args, const Context& context) {
  const LogitRows& x = args.x;
  check_logit_rows("cross_entropy", x);
  dispatch(x.dtype, [&](auto zero) {
    using T = decltype(zero);
    using R = Real<T>;
    const LossFactors<R> f = loss_factors<R>(x);
    const R factor = reciprocal_or_zero(static_cast<const R*>(args.divisor));
    R *loss = static_cast<R*>(args.loss), *lse = static_cast<R*>(args.lse), *entropy = static_cast<R*>(args.entropy);
    parallel_for(x.rows, 1, context.threads, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        T* logits = row_at<T>(x, r);
        const bool ignored = x.target[r] == x.ignore_index;
        const Row<T> row = ignored ? Row<T>{} : loss_of(logits, x.v, x.target[r], entropy != nullptr, f);
        loss[r] = row.loss, lse[r] = row.lse;
        if (entropy != nullptr) entropy[r] = row.entropy;
        if (!args.gradient) continue;
        if (ignored) {
          std::fill_n(logits, x.v, T{});
        } else {
          write_gradient(logits, x.v, x.target[r], row.max, row.norm, std::isnan(row.loss) ? row.loss : factor, f);
        }
      }
    });
  });
}

void cross_entropy_backward(const CrossEntropyBackwardArgs& args, const Context& context) {
  const LogitRows& x = args.x;
  check_logit_rows("cross_entropy_backward", x);
  dispatch(x.dtype, [&](auto zero) {
    using T = decltype(zero);
    using R = Real<T>;
    const LossFactors<R> f = loss_factors<R>(x);
    const R *lse = static_cast<const R*>(args.lse), *grad = static_cast<const R*>(args.grad);
    parallel_for(x.rows, 1, context.threads, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const int64_t target = x.target[r];
        if (target == x.ignore_index) {
          std::fill_n(row_at<T>(x, r), x.v, T{});
          continue;
        }
        const bool valid = target >= 0 && target < x.v;
        const R row_scale = valid ? grad[r] : std::numeric_limits<R>::quiet_NaN();
        write_gradient(row_at<T>(x, r), x.v, target, lse[r], R{1}, row_scale, f);
      }
    });
  });
}

void scale(const ScaleArgs& args, const Context& context) {
  dispatch(args.dtype, [&](auto zero) {
    using T = decltype(zero);
    using R = Real<T>;
    const R by = *static_cast<const R*>(args.factor) * reciprocal_or_zero(static_cast<const R*>(args.divisor));
    if (by == 1) return;
    T* x = static_cast<T*>(args.x);
    parallel_for(args.numel, 1 << 14, context.threads, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) x[i] = rounded<T>(to_float(x[i]) * by);
    });
  });
}

}  // namespace fastpeft::cpu
