// What both backends refuse, in the same words.
#pragma once

#include "common/error.h"
#include "common/integer.h"
#include "fastpeft/nf4.h"

namespace fastpeft {

inline constexpr int64_t kNestedBlock = 256;  // scales a nested scale covers

inline void check_block_size(const char* function, int64_t block_size) {
  check(is_power_of_two(block_size) && block_size >= 32 && block_size <= 4096, function, ": block_size is ", block_size,
        "; it must be a power of two from 32 to 4096");
}

inline void check_nf4_quantize(const NF4QuantizeArgs& args) {
  check_block_size("nf4_quantize", args.block_size);
  check(args.numel >= 0, "nf4_quantize: numel is ", args.numel);
  check(args.dtype != DType::kFloat64, "nf4_quantize: float64 is not supported; pass float32, float16 or bfloat16");
}

inline void check_nf4_dequantize(const NF4DequantizeArgs& args) {
  check_block_size("nf4_dequantize", args.w.block_size);
  check(args.begin >= 0 && args.begin <= args.end && args.end <= args.w.numel, "nf4_dequantize: range [", args.begin,
        ", ", args.end, ") does not lie in a tensor of ", args.w.numel, " elements");
  check(args.begin % args.w.block_size == 0, "nf4_dequantize: the range begins at element ", args.begin,
        ", which is no multiple of the block size ", args.w.block_size);
}

}  // namespace fastpeft
