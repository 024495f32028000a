// Tensor maps for TMA, made on the host and handed to a kernel as a parameter.
#pragma once

#include <cuda.h>

#include "cuda/device/driver.cuh"

namespace fastpeft::cuda {

// [rows, columns] elements of `type`, `bytes` each, in boxes of box_rows by box_columns; `row_pitch` elements from row
// to row, 0: as many as there are columns.
inline CUtensorMap tensor_map(CUtensorMapDataType type, int bytes, CUtensorMapSwizzle swizzle, const void* data,
                              int rows, int columns, int box_rows, int box_columns, int row_pitch = 0) {
  CUtensorMap map;
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t pitch[1] = {static_cast<cuuint64_t>(row_pitch > 0 ? row_pitch : columns) *
                               static_cast<cuuint64_t>(bytes)};
  const cuuint32_t box[2] = {static_cast<cuuint32_t>(box_columns), static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[2] = {1, 1};
  const CUresult status = FASTPEFT_DRIVER(cuTensorMapEncodeTiled)(
      &map, type, 2, const_cast<void*>(data), sizes, pitch, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) {
    throw CudaError(concat("cuTensorMapEncodeTiled of [", rows, ", ", columns, "] failed with status ",
                           static_cast<int>(status), " (", __FILE__, ":", __LINE__, ")"));
  }
  return map;
}

inline CUtensorMapDataType map_type(DType dtype) {
  return dtype == DType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
}

// [rows, columns] of a 16-bit type in boxes of box_rows by 64 columns, under the 128-byte swizzle.
inline CUtensorMap activation_map(DType dtype, const void* data, int rows, int columns, int box_rows,
                                  int row_pitch = 0) {
  return tensor_map(map_type(dtype), 2, CU_TENSOR_MAP_SWIZZLE_128B, data, rows, columns, box_rows, 64, row_pitch);
}

}  // namespace fastpeft::cuda
