// What stands beside the base product of a LoRA linear, y = x W^T + scale (drop(x) A^T) B^T: the down-projection, and
// the gradients by A and B. The up-projection, forward and backward, is part of the base product
// (fastpeft/nf4_linear.h).
//
// A and B are read as float32; what is multiplied is rounded to the dtype of x, sums are float32. In 16-bit matrices a
// rank is rounded up to a multiple of 8 (`padded_rank`) with zeros. Adapters that share x are laid side by side: their
// xa is one [m, sum of padded ranks]. Without dropout a few thread blocks can make most of this while the base product
// runs (NF4LinearBeside).
//
// The mask of drop() is that of fastpeft/dropout.h. Nothing is allocated, and equal calls give equal bits.
#pragma once

#include "fastpeft/types.h"

namespace fastpeft {

constexpr int64_t kMostAdapters = 4;  // that share x
constexpr int64_t padded_rank(int64_t r) { return (r + 7) / 8 * 8; }

struct LoraAdapter {
  const float* a = nullptr;  // [r, k]
  const float* b = nullptr;  // [n, r]
  int64_t n = 0, r = 0;
  double scale = 1.0;
};

// xa = drop(x) A^T.
struct LoraProjectArgs {
  const void* x;  // [m, k], of `dtype`
  DType dtype;    // float16 or bfloat16
  int64_t m, k;
  LoraAdapter adapters[kMostAdapters];
  int64_t count;
  void* a16;  // [sum of padded ranks, k]: room for a copy of all A
  void* xa;   // [m, sum of padded ranks]
  double p;
  uint64_t seed;
};

// dxa = scale dy B and dB = scale dy^T xa in one pass over dy.
struct LoraBackwardArgs {
  const void* dy;  // [m, n], of `dtype`
  DType dtype;
  int64_t m;
  LoraAdapter adapter;
  const void* xa;
  int64_t xa_pitch;  // elements from one row to the next
  void* dxa;         // [m, padded rank]
  int64_t dxa_pitch;
  float* db;  // [n, r]
  void* workspace;
  int64_t workspace_bytes;
};

// dA = dxa^T drop(x), of all adapters in one pass over x.
struct LoraGradientArgs {
  const void* x;  // [m, k], of `dtype`
  DType dtype;
  int64_t m, k;
  const void* dxa;  // [m, sum of padded ranks]
  int64_t count;
  float* da[kMostAdapters];  // [r, k]
  int64_t r[kMostAdapters];
  double p;
  uint64_t seed;
  void* workspace;  // 16-byte aligned, in use as long as the call; lora_gradient_workspace tells how much
  int64_t workspace_bytes;
  unsigned* counters;  // one for each 256 of k: zero, and zero again afterwards
};

namespace cuda {
void lora_project(const LoraProjectArgs& args, const Context& context);
void lora_backward(const LoraBackwardArgs& args, const Context& context);
void lora_gradient(const LoraGradientArgs& args, const Context& context);
}  // namespace cuda

}  // namespace fastpeft
