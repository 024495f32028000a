// Launches nf4_linear_tiles_kernel.cuh: tensor maps of x and y, and the kernel for the plan's tile.
#include "cuda/nf4_linear_tiles.h"

#include "cuda/device/tensor_map.cuh"
#include "cuda/nf4_linear_tiles_kernel.cuh"

namespace fastpeft::cuda {
namespace {

template <typename T, bool kBackward, int kTokens, int kCluster>
void launch_kernel(const NF4LinearArgs& args, const nf4_tiles::Plan& plan, const Context& context) {
  using C = nf4_tiles::Config<kTokens, kCluster>;
  const nf4_tiles::Problem p = nf4_tiles::make_problem(args, plan);
  const CUtensorMap map_x = activation_map(args.dtype, args.x, plan.m, plan.depth, kTokens);
  const CUtensorMap map_y =
      p.store_by_tma ? activation_map(args.dtype, args.y, plan.m, plan.out, C::kStoreTokens) : map_x;
  const CUtensorMap map_w = kBackward
                                ? tensor_map(CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, CU_TENSOR_MAP_SWIZZLE_64B, args.w.codes,
                                             p.n, p.k / 2, nf4_tiles::kStep, nf4_tiles::kTileOut / 2)
                                : tensor_map(CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, CU_TENSOR_MAP_SWIZZLE_32B, args.w.codes,
                                             p.n, p.k / 2, nf4_tiles::kTileOut, nf4_tiles::kStep / 2);
  launch(
      [&] { return concat("nf4_linear of m = ", args.m, ", n = ", args.n, ", k = ", args.k, ", tiles of ", kTokens); },
      nf4_tiles::kernel<T, kBackward, kTokens, kCluster>,
      Grid{.blocks = static_cast<unsigned>(nf4_tiles::grid(plan)),
           .threads = C::kThreads,
           .smem_bytes = C::kBytes,
           .cluster = kCluster,
           .overlap_launch = true},
      context, map_x, map_w, map_y, p);
}

template <typename T, bool kBackward>
void choose_tile(const NF4LinearArgs& args, const nf4_tiles::Plan& plan, const Context& context) {
  switch (plan.tokens + plan.cluster) {
    case 32 + 1: return launch_kernel<T, kBackward, 32, 1>(args, plan, context);
    case 64 + 1: return launch_kernel<T, kBackward, 64, 1>(args, plan, context);
    case 128 + 1: return launch_kernel<T, kBackward, 128, 1>(args, plan, context);
    case 128 + 2: return launch_kernel<T, kBackward, 128, 2>(args, plan, context);
    case 256 + 1: return launch_kernel<T, kBackward, 256, 1>(args, plan, context);
    default: return launch_kernel<T, kBackward, 256, 2>(args, plan, context);
  }
}

template <typename T>
void choose_direction(const NF4LinearArgs& args, const nf4_tiles::Plan& plan, const Context& context) {
  return args.transposed ? choose_tile<T, true>(args, plan, context) : choose_tile<T, false>(args, plan, context);
}

}  // namespace

void nf4_linear_tiles(const NF4LinearArgs& args, const nf4_tiles::Plan& plan, const Context& context) {
  args.dtype == DType::kBFloat16 ? choose_direction<BFloat16>(args, plan, context)
                                 : choose_direction<Float16>(args, plan, context);
}

}  // namespace fastpeft::cuda
