// From rows of logits to a loss a row, and to the gradient by the logits, written in their place.
//
// With z_j = logit_scale * cap(x_j), cap(x) = softcap * tanh(x / softcap), and label smoothing e over v columns:
//   lse = log(sum_j exp(z_j));   p_j = exp(z_j - lse);   entropy = lse - sum_j p_j z_j
//   loss = lse - (1 - e) z_target - e / v * sum_j z_j
//   dloss/dx_j = (p_j - (1 - e) [j = target] - e / v) * dz_j/dx_j
// A row whose target is ignored has loss, lse, entropy and gradient zero. A target outside [0, v) makes its row's loss
// and gradient NaN. Sums are float32, or float64 for float64 logits; "real" below is that type.
#pragma once

#include "fastpeft/types.h"

namespace fastpeft {

struct LogitRows {
  void* logits;  // [rows, stride], of `dtype`; CUDA overwrites what lies between column v and the stride too
  DType dtype;   // float64 on the CPU only
  int64_t rows, v;
  int64_t stride;         // on CUDA a multiple of 16 bytes, as is the address
  const int64_t* target;  // [rows]
  int64_t ignore_index;
  double label_smoothing, logit_scale;
  double softcap;  // 0 for none
};

struct CrossEntropyArgs {
  LogitRows x;
  void* loss;           // real[rows]
  void* lse;            // real[rows]
  void* entropy;        // real[rows], or null
  bool gradient;        // overwrite the logits with dloss/dx / divisor
  const void* divisor;  // real[1], or null for 1; where it is 0 the gradient is 0
  bool hold_rows;       // CUDA, compute capability 9.0: read long rows once, into the shared memory of a cluster
};

// Overwrites the logits with grad * dloss/dx, from the lse of an earlier cross_entropy.
struct CrossEntropyBackwardArgs {
  LogitRows x;
  const void* lse;   // real[rows]
  const void* grad;  // real[rows]
};

// x *= factor / divisor, in place; on CUDA nothing but the two scalars is read when that is 1.
struct ScaleArgs {
  void* x;  // [numel], of `dtype`
  DType dtype;
  int64_t numel;
  const void* factor;   // real[1]
  const void* divisor;  // real[1], or null for 1; where it is 0 so is the quotient
};

namespace cpu {
void cross_entropy(const CrossEntropyArgs& args, const Context& context);
void cross_entropy_backward(const CrossEntropyBackwardArgs& args, const Context& context);
void scale(const ScaleArgs& args, const Context& context);
}  // namespace cpu

namespace cuda {
void cross_entropy(const CrossEntropyArgs& args, const Context& context);
void cross_entropy_backward(const CrossEntropyBackwardArgs& args, const Context& context);
void scale(const ScaleArgs& args, const Context& context);
}  // namespace cuda

}  // namespace fastpeft
