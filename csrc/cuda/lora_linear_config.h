// Whether the kernels take LoRA linears that share x, forward and backward, and what memory they need: a pure function
// of sizes and device, tested without a GPU. The others are composed of the framework's products by the caller.
//
// In     NF4 bases and few enough adapters of ranks that the tile kernel takes, on a Hopper, from 256 tokens on: below
//        that the tiles are mostly empty, and what counts is the number of launches.
#pragma once

#include <algorithm>
#include <string>

#include "common/error.h"
#include "cuda/lora_plan.h"
#include "cuda/nf4_linear_config.h"

namespace fastpeft::cuda {

struct LoraLinearSizes {
  int64_t m, k;
  int64_t count;  // of linears
  int64_t n[kMostAdapters], r[kMostAdapters];
  int64_t block_size[kMostAdapters];  // of the NF4 base
  DType dtype;
  bool aligned;  // activations and codes lie at 16-byte boundaries
};

struct LoraLinearPlan {
  bool fused = false;
  int64_t forward_bytes = 0, backward_bytes = 0;  // of the products' workspace, one after another
  int64_t sums_bytes = 0;                         // of the gradients' workspaces: free again before dx is written
  int counters = 0;                               // unsigned words, zero
  std::string reason;                             // in words, for the person who asks why
};

constexpr int64_t kLeastFusedTokens = 256;

inline LoraLinearPlan lora_linear_plan(const LoraLinearSizes& s, const DeviceLimits& device) {
  const auto composed = [](const std::string& reason) {
    LoraLinearPlan plan;
    plan.reason = "composed: " + reason;
    return plan;
  };
  if (s.count < 1 || s.count > kMostAdapters) return composed(concat(s.count, " adapters, not 1 to ", kMostAdapters));
  if (s.m < kLeastFusedTokens) return composed(concat("m is ", s.m, ", below ", kLeastFusedTokens));
  LoraLinearPlan plan;
  int64_t rank = 0;
  for (int64_t i = 0; i < s.count; ++i) {
    for (const bool transposed : {false, true}) {
      const NF4LinearPlan product = nf4_linear_plan({s.m, s.n[i], s.k, transposed, s.block_size[i], s.dtype, s.aligned,
                                                     /*aligned_scales=*/false, padded_rank(s.r[i])},
                                                    device);
      if (product.kernel != NF4LinearKernel::kTiles) {
        const std::string& reason = product.reason;  // "dequantise: ..."
        return composed(reason.substr(reason.find(": ") + 2));
      }
      int64_t& bytes = transposed ? plan.backward_bytes : plan.forward_bytes;
      bytes = std::max(bytes, product.workspace_bytes);
      plan.counters = std::max(plan.counters, product.counters);
    }
    const lora_dy::Plan pass = lora_dy::make_plan(s.m, s.n[i], device);
    plan.sums_bytes = std::max(plan.sums_bytes, lora_dy::workspace_bytes(pass, s.m, s.n[i], s.r[i]));
    rank += padded_rank(s.r[i]);
  }
  const lora_da::Plan pass = lora_da::make_plan(s.m, s.k, device);
  plan.sums_bytes = std::max(plan.sums_bytes, lora_da::workspace_bytes(pass, rank));
  plan.counters = std::max(plan.counters, pass.column_blocks);
  plan.fused = true;
  plan.reason = concat("fused: ", s.count, s.count == 1 ? " adapter" : " adapters", " of ", rank, " ranks in all");
  return plan;
}

}  // namespace fastpeft::cuda
