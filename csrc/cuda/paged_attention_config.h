// How attention over pages is cut up: pure arithmetic on the host.
#pragma once

#include <algorithm>

#include "common/integer.h"
#include "cuda/device_limits.h"

namespace fastpeft::cuda {

constexpr int kPagedPartTokens = 64;  // a part of a row's tokens has a multiple of these

struct PagedAttentionPlan {
  int group;       // heads of q a thread block has: 1, 4 or 8
  int64_t blocks;  // of heads, of a row
  int64_t parts;   // a row's tokens are cut into, at most
  int64_t floats;  // of workspace
  int64_t counters;
};

// Parts make up for few rows, up to two blocks an SM. They are cut on the device, by the row's length then, as a
// captured graph is replayed with any lengths.
inline PagedAttentionPlan paged_attention_plan(int64_t rows, int64_t heads, int64_t kv_heads, int64_t dim,
                                               int64_t most_tokens, const DeviceLimits& device) {
  const int64_t share = heads / kv_heads;
  PagedAttentionPlan plan{share == 1 ? 1 : share <= 4 ? 4 : 8, 0, 1, 0, 0};
  plan.blocks = kv_heads * ceil_div(share, plan.group);
  const int64_t wanted = ceil_div(2 * device.sms, std::max<int64_t>(1, rows * plan.blocks));
  plan.parts = std::max<int64_t>(1, std::min(wanted, ceil_div(most_tokens, kPagedPartTokens)));
  if (plan.parts > 1) {
    plan.floats = rows * heads * plan.parts * (dim + 2);
    plan.counters = rows * plan.blocks;
  }
  return plan;
}

}  // namespace fastpeft::cuda
