// Launching nf4_linear_tiles_kernel.cuh: tensor maps, and what the kernel is told. Shared by the files that hold its
// instances, without and with an adapter.
#pragma once

#include <cuda.h>

#include "cuda/device/launch.cuh"
#include "cuda/device/tensor_map.cuh"
#include "cuda/nf4_linear_tiles_kernel.cuh"
#include "fastpeft/nf4_linear.h"

namespace fastpeft::cuda::nf4_tiles {

template <typename C, bool kBackward>
typename C::AdapterOrNone adapter_of([[maybe_unused]] const NF4LinearArgs& args, [[maybe_unused]] const Plan& plan) {
  typename C::AdapterOrNone adapter{};
  if constexpr (C::kAdapter) {
    const NF4LinearAdapter& from = args.adapter;
    adapter.r = static_cast<int>(from.r);
    adapter.xa = tensor_map(map_type(args.dtype), 2, CU_TENSOR_MAP_SWIZZLE_32B, from.xa, static_cast<int>(args.m),
                            adapter.r, C::kTokens, kPieceRank, static_cast<int>(from.xa_pitch));
    adapter.factor = from.factor, adapter.factor_rank = static_cast<int>(from.factor_rank);
    adapter.scale = static_cast<float>(from.scale);
    adapter.mask = make_mask(kBackward ? from.p : 0.0, from.seed);
    adapter.add_to_y = from.add_to_y;
    adapter.early = from.early || plan.beside_blocks > 0;
    adapter.ready = plan.makes ? args.counters + product_counters(plan) : nullptr;
    adapter.writers = kReadyWriters;
  }
  return adapter;
}

template <typename T, bool kBackward, int kTokens, int kCluster, bool kAdapter, bool kExperts = false>
void launch_kernel(const NF4LinearArgs& args, const Plan& plan, const Context& context, const Experts& experts = {}) {
  using C = Config<kTokens, kCluster, kAdapter, kExperts>;
  Problem p = make_problem(args, plan);
  p.experts = experts;
  const int w_rows = kExperts ? experts.count * p.n : p.n;
  const CUtensorMap map_x = activation_map(args.dtype, args.x, plan.m, plan.depth, kTokens);
  const CUtensorMap map_y =
      p.store_by_tma ? activation_map(args.dtype, args.y, plan.m, plan.out, C::kStoreTokens) : map_x;
  const CUtensorMap map_w = kBackward ? tensor_map(CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, CU_TENSOR_MAP_SWIZZLE_64B,
                                                   args.w.codes, w_rows, p.k / 2, kStep, kTileOut / 2)
                                      : tensor_map(CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, CU_TENSOR_MAP_SWIZZLE_32B,
                                                   args.w.codes, w_rows, p.k / 2, kTileOut, kStep / 2);
  launch(
      [&] { return concat("nf4_linear of m = ", args.m, ", n = ", args.n, ", k = ", args.k, ", tiles of ", kTokens); },
      kernel<T, kBackward, kTokens, kCluster, kAdapter, kExperts>,
      Grid{.blocks = static_cast<unsigned>(kExperts ? experts.blocks : grid(plan)),
           .threads = C::kThreads,
           .smem_bytes = C::kBytes,
           .cluster = kCluster,
           .overlap_launch = true},
      context, map_x, map_w, map_y, adapter_of<C, kBackward>(args, plan), p);
}

}  // namespace fastpeft::cuda::nf4_tiles
