// The low-rank terms of LoRA linears for few tokens, as decoding has them: y_i += scale_i (x A_i^T) B_i^T, for adapters
// that share x. Nothing is kept for a gradient.
//
// Two launches: one makes sums of x A^T over shares of k, before the base products or beside them; one adds them up,
// multiplies by B and adds to y. A is rounded to the dtype of x; sums, B and what becomes of them are float32; what was
// in y, and the sum, are rounded. Nothing is allocated, and equal calls give equal bits.
#pragma once

#include "fastpeft/lora.h"
#include "fastpeft/types.h"

namespace fastpeft {

constexpr int64_t kFewShares = 8;  // of k

// Columns of an adapter in the sums.
constexpr int64_t few_columns(int64_t r) { return (r + 15) / 16 * 16; }

struct LoraFewArgs {
  const void* x;  // [m, k], 16-byte aligned; null if only added
  DType dtype;    // float16 or bfloat16
  int64_t m, k;   // which are taken: cuda/lora_few_config.h
  LoraAdapter adapters[kMostAdapters];
  int64_t count;
  float* sums;             // [kFewShares, m, sum of few_columns]
  void* y[kMostAdapters];  // [m, n] of each
  int64_t y_pitch[kMostAdapters];
};

namespace cuda {
void lora_few_project(const LoraFewArgs& args, const Context& context);
void lora_few_add(const LoraFewArgs& args, const Context& context);
}  // namespace cuda

}  // namespace fastpeft
