// Products with W[n,k] in NF4, straight from its codes: y[m,n] = x[m,k] @ W^T (+ bias), and y[m,k] = x[m,n] @ W.
// Several weights of one input can be multiplied by in one launch: y[m, n1 + n2 + ..].
//
// Which sizes a kernel takes is decided by a pure function, nf4_linear_plan (cuda/nf4_linear_config.h); for the others
// the caller decodes the weight into a workspace (nf4.h) and multiplies with the framework.
#pragma once

#include "fastpeft/lora.h"
#include "fastpeft/nf4.h"
#include "fastpeft/types.h"

namespace fastpeft {

// What a few thread blocks make beside the product: xa, here of all adapters that share x; or, if transposed, dxa and
// dB of this adapter, and dA, of the first columns, of all that share x. Ranks are multiples of 8.
struct NF4LinearBeside {
  int64_t ranks = 0;                    // of all that is made: 0: nothing is
  int64_t gradient_ranks = 0;           // if transposed, of all that share x: 0: no dA
  LoraAdapter adapters[kMostAdapters];  // forward: those that share x; transposed: this one
  void* rounded = nullptr;              // room for their A, or its B, in the dtype of x
  const void* xa = nullptr;             // transposed: as forward made it, this adapter's columns of it
  int64_t xa_pitch = 0;
  float* db = nullptr;        // [n, r]
  float* db_sums = nullptr;   // as many times n r as the plan has thread blocks beside, less one
  const void* x = nullptr;    // [m, k]
  const void* dxa = nullptr;  // [m, gradient_ranks]
  float* da[kMostAdapters] = {};
  int64_t da_r[kMostAdapters] = {};  // 0 from the first that there is not
};

// A low-rank adapter whose product joins that of the base: y += scale xa B^T, and, if transposed, y += drop(xa A).
// What is multiplied is rounded to the dtype of x, B after its scale.
struct NF4LinearAdapter {
  int64_t r = 0;                  // columns of xa: the rank rounded up to a multiple of 8; 0: none
  const void* xa = nullptr;       // [m, r]; made beside the product, if `beside` says so
  int64_t xa_pitch = 0;           // elements from one row of xa to the next
  const float* factor = nullptr;  // B, [n, factor_rank]; if transposed A, [factor_rank, k]
  int64_t factor_rank = 0;
  double scale = 1.0;
  double p = 0.0;  // of dropout, if transposed
  uint64_t seed = 0;
  bool add_to_y = false;  // y is added to: what was there, and the product, are both rounded
  bool early = false;     // the call before on this stream is the one that makes xa, by a kernel that lets others start
  NF4LinearBeside beside{};
};

// Weights of one k, whose rows follow each other: x is read, and launched for, once.
constexpr int kMostGroupedWeights = 3;
struct NF4LinearGroup {
  int count = 0;  // 0: there is only NF4LinearArgs::w
  NF4View w[kMostGroupedWeights];
  int64_t n[kMostGroupedWeights] = {};
};

struct NF4LinearArgs {
  NF4View w;         // of an (n, k) weight
  bool transposed;   // the second product: the gradient by the input
  const void* x;     // [m, k], or [m, n] if transposed; row-major, of `dtype`
  const void* bias;  // [n], of `dtype`, or null; null if transposed
  void* y;           // [m, n], or [m, k] if transposed; row-major, of `dtype`
  DType dtype;       // float16 or bfloat16
  int64_t m, n, k;
  void* workspace;  // 16-byte aligned, of what the plan asks for
  int64_t workspace_bytes;
  unsigned* counters;  // as many as the plan asks for: zero, and zero again afterwards
  bool wgmma;          // false: as if the device had none
  // y += the product, which is rounded before; where the plan can, with y 16-byte aligned.
  bool add_to_y = false;
  NF4LinearAdapter adapter{};
  NF4LinearGroup group{};  // forward, without bias or adapter: w is its first, n the sum
};

namespace cuda {
void nf4_linear(const NF4LinearArgs& args, const Context& context);
}  // namespace cuda

}  // namespace fastpeft
