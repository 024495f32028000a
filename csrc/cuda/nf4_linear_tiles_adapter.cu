// Instances of nf4_linear_tiles_kernel.cuh with an adapter, and the choice between them.
#include "cuda/nf4_linear_tiles.h"
#include "cuda/nf4_linear_tiles_launch.cuh"

namespace fastpeft::cuda {
namespace {

template <typename T, bool kBackward>
void choose_tile(const NF4LinearArgs& args, const nf4_tiles::Plan& plan, const Context& context) {
  switch (plan.tokens + plan.cluster) {
    case 256 + 1: return nf4_tiles::launch_kernel<T, kBackward, 256, 1, true>(args, plan, context);
    case 256 + 2: return nf4_tiles::launch_kernel<T, kBackward, 256, 2, true>(args, plan, context);
    default: break;
  }
  throw ArgumentError(concat("nf4_linear: no kernel with an adapter for tiles of ", plan.tokens, " tokens"));
}

template <typename T>
void choose_direction(const NF4LinearArgs& args, const nf4_tiles::Plan& plan, const Context& context) {
  return args.transposed ? choose_tile<T, true>(args, plan, context) : choose_tile<T, false>(args, plan, context);
}

}  // namespace

void nf4_linear_tiles_adapter(const NF4LinearArgs& args, const nf4_tiles::Plan& plan, const Context& context) {
  const NF4LinearAdapter& a = args.adapter;
  check(a.r <= nf4_tiles::kMostRank && a.r % 8 == 0 && a.xa_pitch % 8 == 0 && is_aligned(a.xa),
        "nf4_linear: an adapter of rank ", a.r, ", a row of xa every ", a.xa_pitch,
        " elements; needs multiples of 8, a rank of at most ", nf4_tiles::kMostRank, ", and 16-byte alignment");
  check(!a.add_to_y || is_aligned(args.y), "nf4_linear: y to add to is not aligned to 16 bytes");
  if (plan.beside_blocks > 0) lora_beside_product(args, plan, context);
  args.dtype == DType::kBFloat16 ? choose_direction<BFloat16>(args, plan, context)
                                 : choose_direction<Float16>(args, plan, context);
}

}  // namespace fastpeft::cuda
