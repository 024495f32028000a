// What a mixture of experts needs beside its products: rows are sorted by expert, spread, and collected again.
//
// A router gives each of T tokens K experts, ids[t, k], and weights[t, k]. place[t, k] is where that pair stands among
// the T * K rows that are sorted by expert, in the order of t * K + k within an expert; expert e has the rows from
// ends[e - 1] to ends[e]. Pairs whose id is no expert's stand behind ends[E - 1].
//   spread    out[place[t, k]] = weights[t, k] * x[t]
//   collect   out[t] = sum over k of weights[t, k] * y[place[t, k]], in the order of k
//   dots      dots[t, k] = sum over columns of x[t] * y[place[t, k]]
// Each of the first two is the gradient of the other, and the third is what both give the weights. Arithmetic is
// float32, with one rounding. These are CUDA's alone; fastpeft/ops/experts.py has them for the CPU.
//
// Source   Shazeer et al., "Outrageously large neural networks", arXiv 1701.06538.
#pragma once

#include "fastpeft/types.h"

namespace fastpeft {

constexpr int64_t kMostRoutedExperts = 1024;

struct ExpertsRouteArgs {
  const int64_t* ids;  // [count]
  int64_t count;       // T * K
  int64_t experts;     // 1 to kMostRoutedExperts
  int32_t* place;      // [count]: each of 0 to count - 1 once, whatever the ids
  int32_t* ends;       // [experts]
};

// A place that is not in 0 to tokens * top_k - 1 is neither read nor written.
struct PlacedRows {
  const int32_t* place;  // [tokens, top_k]
  int64_t tokens, top_k, width;
  DType dtype;  // of the rows; float64 is not supported
};

struct ExpertsSpreadArgs {
  PlacedRows rows;
  const float* weights;  // [tokens, top_k], or null: ones
  const void* x;         // [tokens, width]
  void* out;             // [tokens * top_k, width]
};

struct ExpertsCollectArgs {
  PlacedRows rows;
  const float* weights;  // [tokens, top_k], or null: ones
  const void* y;         // [tokens * top_k, width]
  void* out;             // [tokens, width]
};

struct ExpertsDotsArgs {
  PlacedRows rows;
  const void* x;  // [tokens, width]
  const void* y;  // [tokens * top_k, width]
  float* dots;    // [tokens, top_k]
};

namespace cuda {
void experts_route(const ExpertsRouteArgs& args, const Context& context);
void experts_spread(const ExpertsSpreadArgs& args, const Context& context);
void experts_collect(const ExpertsCollectArgs& args, const Context& context);
void experts_dots(const ExpertsDotsArgs& args, const Context& context);
}  // namespace cuda

}  // namespace fastpeft
