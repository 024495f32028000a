// What both backends refuse of a rotary embedding.
#pragma once

#include "common/error.h"
#include "fastpeft/rope.h"

namespace fastpeft {

inline void check_rope(const RopeArgs& args) {
  check(args.rotary >= 0 && args.rotary % 2 == 0 && args.rotary <= args.dim, "rope: cos and sin have ", args.rotary,
        " columns; it must be an even number, at most the head dimension, ", args.dim);
  check(args.angle_dtype == args.dtype || args.angle_dtype == DType::kFloat32,
        "rope: cos and sin must have the dtype of q, or float32");
  check(args.batch * args.tokens <= INT32_MAX, "rope: got ", args.batch, " x ", args.tokens,
        " tokens; at most 2^31 - 1 are supported");
}

}  // namespace fastpeft
