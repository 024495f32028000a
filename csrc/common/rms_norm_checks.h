// What both backends refuse of an RMSNorm.
#pragma once

#include "common/error.h"
#include "fastpeft/rms_norm.h"

namespace fastpeft {

inline void check_rms_norm(const RmsNormShape& shape) {
  check(shape.rows >= 0 && shape.width >= 1, "rms_norm: got ", shape.rows, " rows of ", shape.width,
        " elements; a row needs at least 1");
  check(shape.weight_dtype == shape.dtype || shape.weight_dtype == DType::kFloat32,
        "rms_norm: the weight must have the dtype of x, or float32");
}

}  // namespace fastpeft
