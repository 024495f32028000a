// The next token of each row, drawn from its logits, and all that a row's state needs for the one after.
//
//   x[j] = logits[j], divided by the penalty where j was seen and x > 0, times it where x < 0;
//   x[j] = -inf for stop tokens until the row has drawn `least` tokens;   p = softmax(x / temperature)
//
// Kept are the top_k largest (all that are as large as the k-th), and of these, in falling order, those before which
// less than top_p of their sum lies, and all that are as large as the last of them; then one is drawn. Temperature 0
// takes the largest, of equals the first. The log-probability is that of the token under softmax(logits / temperature)
// (temperature 1 where it is 0), before penalty and cuts; it is NaN where the logits have NaN or no finite maximum.
//
// The number drawn with is Philox(drawn, seed): a row's tokens depend on its logits and its seed alone, whatever other
// rows there are. Masses are integers of 2^-40 of the largest, so that sums do not depend on their order.
//
// Source   the order of the steps is that of transformers; top-p: Holtzman et al., arXiv 1904.09751; penalty: Keskar et
//          al., arXiv 1909.05858.
#pragma once

#include "fastpeft/types.h"

namespace fastpeft {

struct SampleArgs {
  const void* logits;  // [rows, v]
  DType dtype;         // float64 on the CPU only
  int64_t rows, v, stride;
  const float* temperature;  // [rows] each, from here
  const float* top_p;        // 1: all
  const float* penalty;      // 1: none
  const int32_t* top_k;      // 0: all
  const int32_t* least;
  const int64_t* seed;
  uint8_t* seen;  // [rows, v], set for the token that is drawn; or null, where no row has a penalty
  const int64_t* stop_ids;
  int64_t stop_count;
  int32_t* lengths;  // [rows] of tokens in the cache: one more, and below 0 for idle rows, which stay as they are
  int64_t* drawn;    // [rows] tokens that were drawn: one more
  int64_t* token;    // [rows]
  float* logprob;    // [rows]
  void* partial = nullptr;  // CUDA: sample_workspace_bytes(rows, v), on the 16-byte grid
};

namespace cpu {
void sample(const SampleArgs& args, const Context& context);
}  // namespace cpu

namespace cuda {
void sample(const SampleArgs& args, const Context& context);
}  // namespace cuda

}  // namespace fastpeft
