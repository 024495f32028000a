// Launches nf4_linear_fragments_kernel.cuh.
#include "cuda/nf4_linear_fragments_kernel.cuh"

#include "cuda/device/tensor_map.cuh"
#include "cuda/nf4_linear_tiles.h"

namespace fastpeft::cuda {
namespace {

template <typename T, int kTokens>
void launch_kernel(const NF4LinearArgs& args, const nf4_tiles::Plan& plan, const Context& context) {
  using C = nf4_fragments::Config<kTokens>;
  const nf4_tiles::Problem p = nf4_tiles::make_problem(args, plan);
  const CUtensorMap map_w = tensor_map(
      CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, C::kLineBytes == 64 ? CU_TENSOR_MAP_SWIZZLE_64B : CU_TENSOR_MAP_SWIZZLE_32B,
      args.w.codes, p.n, p.k / 2, nf4_tiles::kTileOut, static_cast<int>(C::kLineBytes));
  const CUtensorMap map_x = activation_map(args.dtype, args.x, plan.m, plan.depth, kTokens);
  const CUtensorMap map_y =
      p.store_by_tma ? activation_map(args.dtype, args.y, plan.m, plan.out, C::kStoreTokens) : map_x;
  launch(
      [&] {
        return concat("nf4_linear of m = ", args.m, ", n = ", args.n, ", k = ", args.k, ", fragments of ", kTokens);
      },
      nf4_fragments::kernel<T, kTokens>,
      Grid{.blocks = static_cast<unsigned>(nf4_tiles::grid(plan)),
           .threads = C::kThreads,
           .smem_bytes = C::kBytes,
           .overlap_launch = true},
      context, map_x, map_w, map_y, p);
}

template <typename T>
void choose_tokens(const NF4LinearArgs& args, const nf4_tiles::Plan& plan, const Context& context) {
  switch (plan.tokens) {
    case 32: return launch_kernel<T, 32>(args, plan, context);
    case 64: return launch_kernel<T, 64>(args, plan, context);
    default: return launch_kernel<T, 256>(args, plan, context);
  }
}

}  // namespace

void nf4_linear_fragments(const NF4LinearArgs& args, const nf4_tiles::Plan& plan, const Context& context) {
  args.dtype == DType::kBFloat16 ? choose_tokens<BFloat16>(args, plan, context)
                                 : choose_tokens<Float16>(args, plan, context);
}

}  // namespace fastpeft::cuda
