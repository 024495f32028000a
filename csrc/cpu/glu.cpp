// Gated activations on the host: rows share the threads.
#include "fastpeft/glu.h"

#include <algorithm>
#include <cmath>

#include "common/glu_math.h"
#include "cpu/numbers.h"
#include "cpu/parallel.h"

namespace fastpeft::cpu {
namespace {

struct HostMath {
  template <typename Real>
  static Real exp(Real x) {
    return std::exp(x);
  }
  template <typename Real>
  static Real divide(Real a, Real b) {
    return a / b;
  }
  template <typename Real>
  static Real erf(Real x) {
    return std::erf(x);
  }
};

// Calls body(row, zero of T, kind constant) for each row.
template <typename Body>
void for_rows(const GluShape& shape, const Context& context, const Body& body) {
  const int64_t grain = std::max<int64_t>(1, (1 << 13) / std::max<int64_t>(1, shape.width));
  dispatch(shape.dtype, [&](auto zero) {
    dispatch_kind(shape.kind, [&](auto kind) {
      parallel_for(shape.rows, grain, context.threads, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) body(row, zero, kind);
      });
    });
  });
}

}  // namespace

void glu(const GluArgs& args, const Context& context) {
  for_rows(args.shape, context, [&](int64_t row, auto zero, auto kind) {
    using T = decltype(zero);
    using Compute = ComputeType<T>;
    const T* gate = static_cast<const T*>(args.gate) + row * args.gate_stride;
    const T* up = static_cast<const T*>(args.up) + row * args.up_stride;
    T* out = static_cast<T*>(args.out) + row * args.out_stride;
    for (int64_t i = 0; i < args.shape.width; ++i) {
      const Compute value = activation<decltype(kind)::value, HostMath>(Compute{to_float(gate[i])}).value;
      out[i] = from_compute<T>(value * to_float(up[i]));
    }
  });
}

void glu_backward(const GluBackwardArgs& args, const Context& context) {
  for_rows(args.shape, context, [&](int64_t row, auto zero, auto kind) {
    using T = decltype(zero);
    using Compute = ComputeType<T>;
    const T* dy = static_cast<const T*>(args.dy) + row * args.dy_stride;
    const T* gate = static_cast<const T*>(args.gate) + row * args.gate_stride;
    const T* up = static_cast<const T*>(args.up) + row * args.up_stride;
    T* dgate = static_cast<T*>(args.dgate) + row * args.dgate_stride;
    T* dup = static_cast<T*>(args.dup) + row * args.dup_stride;
    for (int64_t i = 0; i < args.shape.width; ++i) {
      const auto act = activation<decltype(kind)::value, HostMath>(Compute{to_float(gate[i])});
      const Compute g = to_float(dy[i]);
      dgate[i] = from_compute<T>(g * to_float(up[i]) * act.slope);
      dup[i] = from_compute<T>(g * act.value);
    }
  });
}

}  // namespace fastpeft::cpu
