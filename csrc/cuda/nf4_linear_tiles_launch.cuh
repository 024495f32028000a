// Launching nf4_linear_tiles_kernel.cuh: tensor maps, and what the kernel is told. Shared by the files that hold its
// instances, without and with an adapter.
#pragma once

#include <cuda.h>

#include "common/dropout_mask.h"
#include "cuda/device/launch.cuh"
#include "cuda/nf4_linear_tiles_kernel.cuh"
#include "fastpeft/nf4_linear.h"

namespace fastpeft::cuda::nf4_tiles {

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

// Asked of the driver at run time, so that the module links to no libcuda and loads where there is none.
inline EncodeTiled encode_tiled() {
  static const EncodeTiled found = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result;
    FASTPEFT_CUDA_CHECK(
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result));
    check(result == cudaDriverEntryPointSuccess, "nf4_linear: the driver has no cuTensorMapEncodeTiled; update it");
    return reinterpret_cast<EncodeTiled>(function);
  }();
  return found;
}

// [rows, columns] elements of `type`, `bytes` each, `row_pitch` elements from row to row, in boxes of box_rows by
// box_columns.
inline CUtensorMap tensor_map(CUtensorMapDataType type, int bytes, CUtensorMapSwizzle swizzle, const void* data,
                              int rows, int columns, int row_pitch, int box_rows, int box_columns) {
  CUtensorMap map;
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t pitch[1] = {static_cast<cuuint64_t>(row_pitch) * static_cast<cuuint64_t>(bytes)};
  const cuuint32_t box[2] = {static_cast<cuuint32_t>(box_columns), static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[2] = {1, 1};
  const CUresult status =
      encode_tiled()(&map, type, 2, const_cast<void*>(data), sizes, pitch, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                     swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) {
    throw CudaError(concat("nf4_linear: cuTensorMapEncodeTiled of [", rows, ", ", columns, "] failed with status ",
                           static_cast<int>(status), " (", __FILE__, ":", __LINE__, ")"));
  }
  return map;
}

inline CUtensorMap activation_map(DType dtype, const void* data, int rows, int columns, int row_pitch, int box_rows) {
  return tensor_map(dtype == DType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2,
                    CU_TENSOR_MAP_SWIZZLE_128B, data, rows, columns, row_pitch, box_rows, 64);
}

template <typename C, bool kBackward>
typename C::AdapterOrNone adapter_of([[maybe_unused]] const NF4LinearArgs& args) {
  typename C::AdapterOrNone adapter{};
  if constexpr (C::kAdapter) {
    const NF4LinearAdapter& from = args.adapter;
    const int m = static_cast<int>(args.m), n = static_cast<int>(args.n), k = static_cast<int>(args.k);
    adapter.r = static_cast<int>(from.r);
    adapter.xa = activation_map(args.dtype, from.xa, m, adapter.r, static_cast<int>(from.xa_pitch), C::kTokens);
    adapter.factor = kBackward ? activation_map(args.dtype, from.factor, adapter.r, k, k, kStep)
                               : activation_map(args.dtype, from.factor, n, adapter.r, adapter.r, kTileOut);
    if (kBackward && from.p > 0.0) adapter.threshold = static_cast<uint32_t>(dropout_threshold(from.p));
    adapter.keep_scale = static_cast<float>(1.0 / (1.0 - from.p));
    adapter.seed = from.seed;
    adapter.add_to_y = from.add_to_y;
    adapter.early = from.early;
  }
  return adapter;
}

template <typename T, bool kBackward, int kTokens, int kCluster, bool kAdapter>
void launch_kernel(const NF4LinearArgs& args, const Plan& plan, const Context& context) {
  using C = Config<kTokens, kCluster, kAdapter>;
  Problem p{};
  p.plan = plan;
  p.w = args.w;
  p.n = static_cast<int>(args.n), p.k = static_cast<int>(args.k);
  p.block_shift = log2_of(args.w.block_size / 64);
  p.bias = args.bias;
  p.y = args.y;
  p.store_by_tma = plan.out % 8 == 0 && is_aligned(args.y);
  p.workspace = static_cast<uint8_t*>(args.workspace);
  p.counters = args.counters;
  p.wide_scales = args.w.nested_absmax != nullptr && p.block_shift == 0 && p.k / 64 % 4 == 0 &&
                  reinterpret_cast<uintptr_t>(args.w.absmax) % 4 == 0;
  const CUtensorMap map_x = activation_map(args.dtype, args.x, plan.m, plan.depth, plan.depth, kTokens);
  const CUtensorMap map_y =
      p.store_by_tma ? activation_map(args.dtype, args.y, plan.m, plan.out, plan.out, C::kStoreTokens) : map_x;
  const CUtensorMap map_w = kBackward ? tensor_map(CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, CU_TENSOR_MAP_SWIZZLE_64B,
                                                   args.w.codes, p.n, p.k / 2, p.k / 2, kStep, kTileOut / 2)
                                      : tensor_map(CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, CU_TENSOR_MAP_SWIZZLE_32B,
                                                   args.w.codes, p.n, p.k / 2, p.k / 2, kTileOut, kStep / 2);
  launch(
      [&] { return concat("nf4_linear of m = ", args.m, ", n = ", args.n, ", k = ", args.k, ", tiles of ", kTokens); },
      kernel<T, kBackward, kTokens, kCluster, kAdapter>,
      Grid{.blocks = static_cast<unsigned>(grid(plan)),
           .threads = C::kThreads,
           .smem_bytes = C::kBytes,
           .cluster = kCluster,
           .overlap_launch = true},
      context, map_x, map_w, map_y, adapter_of<C, kBackward>(args), p);
}

}  // namespace fastpeft::cuda::nf4_tiles
