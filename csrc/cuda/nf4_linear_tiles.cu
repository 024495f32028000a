// Launches nf4_linear_tiles_kernel.cuh: tensor maps of x and y, and the kernel for the plan's tile.
#include "cuda/nf4_linear_tiles.h"

#include <cuda.h>

#include "cuda/device/launch.cuh"
#include "cuda/nf4_linear_tiles_kernel.cuh"

namespace fastpeft::cuda {
namespace {

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

// Asked of the driver at run time, so that the module links to no libcuda and loads where there is none.
EncodeTiled encode_tiled() {
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

// [rows, columns] elements of `type`, `bytes` each, in boxes of box_rows by box_columns.
CUtensorMap tensor_map(CUtensorMapDataType type, int bytes, CUtensorMapSwizzle swizzle, const void* data, int rows,
                       int columns, int box_rows, int box_columns) {
  CUtensorMap map;
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t pitch[1] = {static_cast<cuuint64_t>(columns) * static_cast<cuuint64_t>(bytes)};
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

CUtensorMap activation_map(DType dtype, const void* data, int rows, int columns, int box_rows) {
  return tensor_map(dtype == DType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2,
                    CU_TENSOR_MAP_SWIZZLE_128B, data, rows, columns, box_rows, 64);
}

template <typename T, bool kBackward, int kTokens, int kCluster>
void launch_kernel(const NF4LinearArgs& args, const nf4_tiles::Plan& plan, const Context& context) {
  using C = nf4_tiles::Config<kTokens, kCluster>;
  nf4_tiles::Problem p{};
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
