// NF4 quantisation: 4-bit normal-float codes in blocks, with the block scales quantised to 8 bits on request.
//
// Layout   codes   uint8[(numel + 1) / 2]   flat row-major order, high nibble = even index
//          absmax  one scale a block of `block_size` elements: float, or uint8 into `nested_map` (double quantised):
//                  scale = nested_map[q] * nested_absmax[block / 256] + offset
// Both backends give the bits that bitsandbytes 0.50.2 gives on the same device. They differ from each other in
// corners: blocks of zeros (code 7 here, 0 on CUDA), the ragged last block, the approximate reciprocal of CUDA, and
// the rule by which an 8-bit scale is rounded; a file made by either decodes to the same values on both.
//
// Source   QLoRA (arXiv 2305.14314); format: bitsandbytes' functional.py.
#pragma once

#include "fastpeft/types.h"

namespace fastpeft {

struct NF4QuantizeArgs {
  const void* w;       // [numel], of `dtype`
  DType dtype;         // float32, float16 or bfloat16
  int64_t numel;       // 0 is allowed
  int64_t block_size;  // a power of two, 32 to 4096
  uint8_t* codes;      // [(numel + 1) / 2]
  float* absmax;       // [ceil(numel / block_size)]
};

struct NF4QuantizeScalesArgs {
  const float* absmax;      // [blocks]
  const float* offset;      // [1], their mean
  const float* nested_map;  // [256], ascending
  int64_t blocks;
  uint8_t* quantized;    // [blocks]
  float* nested_absmax;  // [ceil(blocks / 256)]
};

// A view of a whole quantised tensor.
struct NF4View {
  const uint8_t* codes;
  const void* absmax;          // uint8 if nested_absmax is set, else float
  const float* nested_absmax;  // null: not double quantised
  const float* nested_map;
  const float* offset;
  int64_t numel;
  int64_t block_size;
};

struct NF4DequantizeArgs {
  NF4View w;
  int64_t begin;  // first element wanted, a multiple of block_size
  int64_t end;    // one past the last, at most w.numel
  void* out;      // [end - begin], of `dtype`
  DType dtype;    // float64 too, on the CPU: the float32 value, widened
};

namespace cpu {
void nf4_quantize(const NF4QuantizeArgs& args, const Context& context);
void nf4_quantize_scales(const NF4QuantizeScalesArgs& args, const Context& context);
void nf4_dequantize(const NF4DequantizeArgs& args, const Context& context);
}  // namespace cpu

namespace cuda {
void nf4_quantize(const NF4QuantizeArgs& args, const Context& context);
void nf4_quantize_scales(const NF4QuantizeScalesArgs& args, const Context& context);
void nf4_dequantize(const NF4DequantizeArgs& args, const Context& context);
}  // namespace cuda

}  // namespace fastpeft
