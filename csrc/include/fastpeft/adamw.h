// AdamW over whole lists of tensors: the norm of all gradients, then one step.
//
// For each element, in float32, with g the gradient times the control's grad_factor, negated if maximize:
//   m = m + (1 - beta1) * (g - m);   v = beta2 * v + (1 - beta2) * g * g
//   p = p * (1 - lr * weight_decay) - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
// Parameter and gradient may each be float32, float16 or bfloat16. Moments are float32, or 8-bit codes of the dynamic
// map (common/dynamic_map.h) with a float32 scale for each block of 256 elements; p then takes m and v as they are
// before they are rounded to codes.
//
// Nothing here waits for the device or allocates: the caller owns the state, the step counts, the table and the
// control, all in memory of the device that computes.
//
// Source   Loshchilov and Hutter, "Decoupled weight decay regularization", arXiv 1711.05101; 8-bit state: Dettmers et
//          al., "8-bit optimizers via block-wise quantization", arXiv 2110.02861.
#pragma once

#include <cstddef>
#include <vector>

#include "fastpeft/types.h"

namespace fastpeft::cuda {
class Arena;
}

namespace fastpeft {

using cuda::Arena;

constexpr int64_t kAdamWBlock = 256;  // elements that share a scale of 8-bit state

// A tensor, or a piece of one whose state lies elsewhere.
struct AdamWRow {
  void* param;  // of the row's first element, as all addresses here
  void* exp_avg;
  void* exp_avg_sq;
  float* absmax;  // of 8-bit state alone
  float* absmax_sq;
  int64_t numel;
  int64_t offset;  // index of the row's first element in its tensor
  int64_t tensor;  // in AdamWList::tensors
};

// What the rows of a tensor share.
struct AdamWTensor {
  float* step;      // how many steps it has taken
  int64_t number;   // its place in the optimizer: tensors round by different random numbers
  int64_t advance;  // 1: a step of this list counts; 0: another list, stepped before, has counted it
};

// What a step found and does, 64 bytes in the device's memory. Starts as {.grad_factor = 1}.
struct alignas(64) AdamWControl {
  float grad_norm;    // of all gradients, unscaled, before clipping
  float grad_factor;  // what a step multiplies gradients by: clipping over the loss's scale
  int32_t skip;       // 1: the step writes nothing
  uint32_t ticket;    // of the norm's thread blocks; zero between calls
  int64_t skipped;    // how many steps have been
  double sum;         // of squares, so far
};
static_assert(sizeof(AdamWControl) == 64);

// State on the host that travels to a slot of an arena and back.
struct AdamWCopy {
  std::byte* host;
  std::byte* slot;
  int64_t bytes;
};

// Rows whose state is in a slot at the same time.
struct AdamWBatch {
  int64_t first_row, rows;
  std::vector<AdamWCopy> copies;
};

// Tensors of equal dtypes that are stepped together.
struct AdamWList {
  std::vector<AdamWRow> rows;
  std::vector<AdamWTensor> tensors;
  DType param_dtype;
  bool eight_bit;
  size_t given = 0;       // rows; a staged list has more, or none of those without elements
  void* table = nullptr;  // on the device, for CUDA alone; its size: common/adamw_table.h

  // Of state on the host alone (adamw_stage): rows are pieces whose state is at addresses of slots.
  Arena* arena = nullptr;
  std::vector<AdamWBatch> batches = {};
  std::vector<int64_t> sources = {};  // for each row, the row that it is a piece of

  // What the table holds by now.
  std::vector<const void*> table_grads = {};
  bool table_written = false;
  bool captured = false;  // a graph writes to the table too, at any time
};

struct AdamWStepArgs {
  AdamWList* list;
  std::vector<const void*> grads;  // for each row as it was given, its tensor's gradient from the first element
  DType grad_dtype;
  AdamWControl* control;
  double lr;
  const float* lr_address;  // in the device's memory, instead of lr; or null
  double beta1, beta2, eps, weight_decay;
  bool maximize;
  bool stochastic;  // rounding to bfloat16 parameters
  uint64_t seed;
};

struct AdamWGradient {
  const void* data;
  int64_t numel;
};

// Gradients of one dtype.
struct AdamWGradients {
  std::vector<AdamWGradient> list;
  DType dtype;
};

constexpr int kAdamWSums = 1024;  // float32 words that the norm needs to work in

struct AdamWNormArgs {
  std::vector<AdamWGradients> gradients;
  AdamWControl* control;
  float* sums;
  double max_norm;          // infinity: no clipping
  const float* grad_scale;  // of the loss, or null
  const float* found_inf;   // not 0: skip; or null
};

namespace cpu {
void adamw_norm(const AdamWNormArgs& args, const Context& context);
void adamw_step(const AdamWStepArgs& args, const Context& context);
}  // namespace cpu

namespace cuda {
void adamw_norm(const AdamWNormArgs& args, const Context& context);
void adamw_step(const AdamWStepArgs& args, const Context& context);  // of a staged list, on the arena's streams between

// Makes a list of rows whose state lies in an arena's host pages one that is stepped through the arena's slots; of a
// managed arena it is stepped where it lies.
void adamw_stage(AdamWList& list, Arena& arena);
}  // namespace cuda

}  // namespace fastpeft
