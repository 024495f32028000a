// Rotary embedding on the host: heads share the threads.
#include "fastpeft/rope.h"

#include <algorithm>

#include "common/rope_checks.h"
#include "cpu/numbers.h"
#include "cpu/parallel.h"

namespace fastpeft::cpu {
namespace {

template <typename T, typename A>
void rotate_head(const RopeArgs& args, const RopeTensor& tensor, int64_t sample, int64_t token, int64_t head) {
  using Compute = ComputeType<T>;
  const T* in = static_cast<const T*>(tensor.in) + sample * tensor.in_batch_stride + head * tensor.in_head_stride +
                token * tensor.in_token_stride;
  T* out = static_cast<T*>(tensor.out) + sample * tensor.out_batch_stride + head * tensor.out_head_stride +
           token * tensor.out_token_stride;
  const A* cos =
      static_cast<const A*>(args.cos.values) + sample * args.cos.batch_stride + token * args.cos.token_stride;
  const A* sin =
      static_cast<const A*>(args.sin.values) + sample * args.sin.batch_stride + token * args.sin.token_stride;
  const int64_t half = args.rotary / 2;
  for (int64_t i = 0; i < half; ++i) {
    const Compute a = to_float(in[i]), b = to_float(in[i + half]);
    const Compute cos_a = to_float(cos[i]), cos_b = to_float(cos[i + half]);
    const Compute sin_a = to_float(sin[i]), sin_b = to_float(sin[i + half]);
    out[i] = from_compute<T>(args.backward ? a * cos_a + b * sin_b : a * cos_a - b * sin_a);
    out[i + half] = from_compute<T>(args.backward ? b * cos_b - a * sin_a : b * cos_b + a * sin_b);
  }
  std::copy(in + args.rotary, in + args.dim, out + args.rotary);
}

}  // namespace

void rope(const RopeArgs& args, const Context& context) {
  check_rope(args);
  dispatch(args.dtype, [&](auto zero) {
    const auto run = [&](auto angle_zero) {
      parallel_for(args.batch * args.tokens, 8, context.threads, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          for (const RopeTensor& tensor : {args.q, args.k}) {
            for (int64_t head = 0; head < tensor.heads; ++head) {
              rotate_head<decltype(zero), decltype(angle_zero)>(args, tensor, i / args.tokens, i % args.tokens, head);
            }
          }
        }
      });
    };
    if (args.angle_dtype == args.dtype) {
      run(zero);
    } else {
      run(float{});
    }
  });
}

}  // namespace fastpeft::cpu
