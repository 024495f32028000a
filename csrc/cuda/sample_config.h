// How rows of logits are cut up for a draw: pure arithmetic on the host.
#pragma once

#include "common/integer.h"

namespace fastpeft::cuda {

inline constexpr int kSamplePart = 8192;  // logits of a row that a thread block reads at first
inline constexpr int kSamplePartBytes = 16;

// By the row's length alone, so that a row's sums do not depend on how many rows there are.
inline int64_t sample_parts(int64_t v) { return ceil_div(v, kSamplePart); }

inline int64_t sample_workspace_bytes(int64_t rows, int64_t v) { return rows * sample_parts(v) * kSamplePartBytes; }

}  // namespace fastpeft::cuda
