// Which calls the kernels for few tokens take, and what they need: pure arithmetic on the host.
#pragma once

#include "common/integer.h"
#include "fastpeft/lora_few.h"

namespace fastpeft::cuda {

constexpr int64_t kMostFewTokens = 64;
constexpr int kFewStep = 64, kFewRankTile = 16;  // of k, and of a rank

// Float32 words of sums, for adapters of these ranks; 0 for a call that is not taken.
inline int64_t lora_few_floats(int64_t m, int64_t k, const int64_t* ranks, int64_t count, DType dtype,
                               int architecture) {
  const bool is_16bit = dtype == DType::kFloat16 || dtype == DType::kBFloat16;
  if (!is_16bit || architecture < 80 || m < 1 || m > kMostFewTokens || k < 1 || k >= (1 << 30) || k % kFewStep != 0 ||
      count < 1 || count > kMostAdapters)
    return 0;
  int64_t columns = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (ranks[i] < 1 || ranks[i] >= (1 << 16)) return 0;
    columns += few_columns(ranks[i]);
  }
  return kFewShares * m * columns;
}

}  // namespace fastpeft::cuda
