// Launches nf4_linear_fragments_kernel.cuh.
#include "cuda/nf4_linear_fragments_kernel.cuh"

#include <algorithm>

#include "cuda/device/tensor_map.cuh"
#include "cuda/nf4_linear_tiles.h"

namespace fastpeft::cuda {
namespace {

template <typename T, int kTokens, int kCount>
void launch_kernel(const NF4LinearArgs& args, const nf4_tiles::Plan& plan, const Context& context) {
  using C = nf4_fragments::Config<kTokens>;
  const nf4_tiles::Problem p = nf4_tiles::make_problem(args, plan);
  nf4_fragments::Weights<kCount> weights{};
  const int count = std::max(1, args.group.count);
  for (int i = 0, first = 0; i < kCount; ++i) {
    const int which = std::min(i, count - 1);  // what is beyond the last is not read
    const int n = kCount == 1 ? p.n : static_cast<int>(args.group.n[which]);
    weights.w[i] = kCount == 1 ? args.w : args.group.w[which];
    weights.first[i] = i < count ? first : INT32_MAX;
    weights.codes[i] = tensor_map(CU_TENSOR_MAP_DATA_TYPE_UINT8, 1,
                                  C::kLineBytes == 64 ? CU_TENSOR_MAP_SWIZZLE_64B : CU_TENSOR_MAP_SWIZZLE_32B,
                                  weights.w[i].codes, n, p.k / 2, nf4_tiles::kTileOut, static_cast<int>(C::kLineBytes));
    first += n;
  }
  const CUtensorMap map_x = activation_map(args.dtype, args.x, plan.m, plan.depth, kTokens);
  const CUtensorMap map_y =
      p.store_by_tma ? activation_map(args.dtype, args.y, plan.m, plan.out, C::kStoreTokens) : map_x;
  launch(
      [&] {
        return concat("nf4_linear of m = ", args.m, ", n = ", args.n, ", k = ", args.k, ", fragments of ", kTokens);
      },
      nf4_fragments::kernel<T, kTokens, kCount>,
      Grid{.blocks = static_cast<unsigned>(nf4_tiles::grid(plan)),
           .threads = C::kThreads,
           .smem_bytes = C::kBytes,
           .overlap_launch = true},
      context, map_x, map_y, weights, p);
}

template <typename T, int kCount>
void choose_tokens(const NF4LinearArgs& args, const nf4_tiles::Plan& plan, const Context& context) {
  if (plan.tokens == 32) return launch_kernel<T, 32, kCount>(args, plan, context);
  if (plan.tokens == 64) return launch_kernel<T, 64, kCount>(args, plan, context);
  if constexpr (kCount == 1) launch_kernel<T, 256, 1>(args, plan, context);
}

template <typename T>
void choose_count(const NF4LinearArgs& args, const nf4_tiles::Plan& plan, const Context& context) {
  args.group.count > 0 ? choose_tokens<T, kMostGroupedWeights>(args, plan, context)
                       : choose_tokens<T, 1>(args, plan, context);
}

}  // namespace

void nf4_linear_fragments(const NF4LinearArgs& args, const nf4_tiles::Plan& plan, const Context& context) {
  args.dtype == DType::kBFloat16 ? choose_count<BFloat16>(args, plan, context)
                                 : choose_count<Float16>(args, plan, context);
}

}  // namespace fastpeft::cuda
