// Instances of nf4_linear_tiles_kernel.cuh without an adapter, and the choice between them.
#include "cuda/nf4_linear_tiles.h"

#include "cuda/nf4_linear_tiles_launch.cuh"

namespace fastpeft::cuda {
namespace {

template <typename T, bool kBackward>
void choose_tile(const NF4LinearArgs& args, const nf4_tiles::Plan& plan, const Context& context) {
  switch (plan.tokens + plan.cluster) {
    case 32 + 1: return nf4_tiles::launch_kernel<T, kBackward, 32, 1, false>(args, plan, context);
    case 64 + 1: return nf4_tiles::launch_kernel<T, kBackward, 64, 1, false>(args, plan, context);
    case 128 + 1: return nf4_tiles::launch_kernel<T, kBackward, 128, 1, false>(args, plan, context);
    case 128 + 2: return nf4_tiles::launch_kernel<T, kBackward, 128, 2, false>(args, plan, context);
    case 256 + 1: return nf4_tiles::launch_kernel<T, kBackward, 256, 1, false>(args, plan, context);
    default: return nf4_tiles::launch_kernel<T, kBackward, 256, 2, false>(args, plan, context);
  }
}

template <typename T>
void choose_direction(const NF4LinearArgs& args, const nf4_tiles::Plan& plan, const Context& context) {
  return args.transposed ? choose_tile<T, true>(args, plan, context) : choose_tile<T, false>(args, plan, context);
}

}  // namespace

void nf4_linear_tiles(const NF4LinearArgs& args, const nf4_tiles::Plan& plan, const Context& context) {
  if (args.adapter.r > 0) return nf4_linear_tiles_adapter(args, plan, context);
  args.dtype == DType::kBFloat16 ? choose_direction<BFloat16>(args, plan, context)
                                 : choose_direction<Float16>(args, plan, context);
}

}  // namespace fastpeft::cuda
