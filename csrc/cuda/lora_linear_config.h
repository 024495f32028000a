// Whether the kernels take LoRA linears that share x, forward and backward, and what memory they need: a pure function
// of sizes and device, tested without a GPU. The others are composed of the framework's products by the caller.
//
// In     NF4 bases and few enough adapters of ranks that the tile kernel takes, on a Hopper, from 256 tokens on: below
//        that the tiles are mostly empty, and what counts is the number of launches.
#pragma once

#include <algorithm>
#include <numeric>
#include <string>

#include "common/dropout_mask.h"
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
  bool aligned;          // activations and codes lie at 16-byte boundaries
  bool aligned_factors;  // A and B do
  double p;              // of dropout
};

struct LoraLinearPlan {
  bool fused = false;
  bool beside = false;  // the products are told what could be made beside them
  // What is made beside the products, instead of before them: xa beside the first; dxa and dB beside each; and dA
  // beside the longest. With dropout only dxa and dB are, and then dA is made when the products are done.
  bool xa_beside = false, dxa_beside[kMostAdapters] = {}, da_beside = false, da_after = false;
  int64_t forward_bytes = 0, backward_bytes = 0;  // of the products' workspace, one after another
  int64_t xa_bytes = 0, dxa_bytes = 0;            // of the workspace of what is made beside, likewise
  int64_t sums_bytes = 0;                         // of what is made before: free again before dx is written
  int64_t after_bytes = 0;                        // of dA, if it is made after
  int counters = 0;                               // unsigned words, zero
  std::string reason;                             // in words, for the person who asks why
};

constexpr int64_t kLeastFusedTokens = 256;
constexpr double kMostAfterShare = 0.02;  // of all y's bytes, for sums of dA that cannot lie in dx's memory

// Room for the factor in 16 bits and, backward, for sums of dB.
inline int64_t beside_bytes(const nf4_tiles::Plan& plan, bool transposed, int64_t n, int64_t k, int64_t ranks) {
  if (!plan.makes) return 0;
  return 2 * ranks * (transposed ? n : k) + (transposed ? 4 * n * ranks * (plan.beside_blocks - 1) : 0);
}

inline LoraLinearPlan lora_linear_plan(const LoraLinearSizes& s, const DeviceLimits& device) {
  const auto composed = [](const std::string& reason) {
    LoraLinearPlan plan;
    plan.reason = "composed: " + reason;
    return plan;
  };
  if (s.count < 1 || s.count > kMostAdapters) return composed(concat(s.count, " adapters, not 1 to ", kMostAdapters));
  if (s.m < kLeastFusedTokens) return composed(concat("m is ", s.m, ", below ", kLeastFusedTokens));
  if (s.p > kMostFusedDropout) return composed(concat("dropout ", s.p, " is above ", kMostFusedDropout));
  LoraLinearPlan plan;
  int64_t rank = 0;
  bool beside = s.aligned_factors && s.m >= nf4_tiles::kLeastBesideTokens && s.m <= nf4_tiles::kMostBesideTokens;
  for (int64_t i = 0; i < s.count; ++i) {
    rank += padded_rank(s.r[i]);
    beside = beside && s.r[i] % 8 == 0;
  }
  beside = beside && rank <= nf4_tiles::kMostBesideRanks;
  const lora_da::Plan gradient = lora_da::make_plan(s.m, s.k, device);
  if (beside && s.p > 0) {
    const int64_t y_bytes = 2 * s.m * std::accumulate(s.n, s.n + s.count, int64_t{0});
    plan.after_bytes = lora_da::workspace_bytes(gradient, rank);
    beside = static_cast<double>(plan.after_bytes) <= kMostAfterShare * static_cast<double>(y_bytes);
  }
  plan.beside = beside;
  // The longest product of the backward pass comes last: it leaves most time for dA. Only if dA is made beside it can
  // dxa be beside the others.
  const int64_t longest = std::max_element(s.n, s.n + s.count) - s.n;
  const auto product_plan = [&](int64_t i, bool transposed) {
    nf4_tiles::Beside work{};
    if (beside && s.p == 0 && !transposed && i == 0) work.ranks = static_cast<int>(rank);
    if (beside && transposed && (i == longest || plan.da_beside || s.p > 0)) work.ranks = static_cast<int>(s.r[i]);
    if (beside && s.p == 0 && transposed && i == longest) work.gradient_ranks = static_cast<int>(rank);
    const NF4LinearPlan product = nf4_linear_plan({s.m, s.n[i], s.k, transposed, s.block_size[i], s.dtype, s.aligned,
                                                   /*aligned_scales=*/false, padded_rank(s.r[i]), work},
                                                  device);
    int64_t& bytes = transposed ? plan.dxa_bytes : plan.xa_bytes;
    bytes = std::max(bytes, beside_bytes(product.tiles, transposed, s.n[i], s.k, work.ranks));
    return product;
  };
  plan.da_beside = product_plan(longest, true).tiles.makes_gradient;
  for (int64_t i = 0; i < s.count; ++i) {
    for (const bool transposed : {false, true}) {
      const NF4LinearPlan product = product_plan(i, transposed);
      if (product.kernel != NF4LinearKernel::kTiles) {
        const std::string& reason = product.reason;  // "dequantise: ..."
        return composed(reason.substr(reason.find(": ") + 2));
      }
      int64_t& bytes = transposed ? plan.backward_bytes : plan.forward_bytes;
      bytes = std::max(bytes, product.workspace_bytes);
      plan.counters = std::max(plan.counters, product.counters);
      if (transposed) plan.dxa_beside[i] = product.tiles.makes;
      plan.da_after = plan.da_after || (transposed && s.p > 0 && product.tiles.makes);
      if (!transposed && i == 0) plan.xa_beside = product.tiles.makes;
    }
    const lora_dy::Plan pass = lora_dy::make_plan(s.m, s.n[i], device);
    plan.sums_bytes = std::max(plan.sums_bytes, lora_dy::workspace_bytes(pass, s.m, s.n[i], s.r[i]));
  }
  if (!plan.da_after) plan.after_bytes = 0;
  plan.sums_bytes = std::max(plan.sums_bytes, lora_da::workspace_bytes(gradient, rank));
  plan.counters = std::max(plan.counters, gradient.column_blocks);
  plan.fused = true;
  plan.reason = concat("fused: ", s.count, s.count == 1 ? " adapter" : " adapters", " of ", rank, " ranks in all");
  return plan;
}

}  // namespace fastpeft::cuda
