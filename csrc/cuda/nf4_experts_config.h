// Whether the tile kernel takes the products of a mixture's experts, and with which tiles: a pure function of sizes and
// device, tested without a GPU. How many tokens an expert has is known on the device alone; the choice assumes that
// they are spread evenly.
#pragma once

#include <algorithm>
#include <string>

#include "common/error.h"
#include "common/integer.h"
#include "cuda/device_limits.h"
#include "cuda/nf4_linear_tiles_plan.h"
#include "fastpeft/experts.h"
#include "fastpeft/nf4_experts.h"

namespace fastpeft::cuda {

constexpr int kMostExperts = kMostRoutedExperts;  // a thread each

struct NF4ExpertsSizes {
  int64_t m, experts, n, k;
  bool transposed;
  int64_t block_size;
  DType dtype;
  bool aligned;  // x, y and the codes lie at 16-byte boundaries
};

struct NF4ExpertsPlan {
  bool fused = false;
  int tokens = 0, cluster = 0;  // of a tile; tiles of a column
  int64_t columns = 0;          // at most
  int64_t workspace_bytes = 0;
  std::string reason;  // in words
};

// Columns are listed as {first row of the expert's weight, first token, end of the expert's tokens, -}, behind 16 bytes
// that hold their number.
constexpr int64_t kColumnBytes = 16;

inline NF4ExpertsPlan nf4_experts_plan(const NF4ExpertsSizes& s, const DeviceLimits& device) {
  NF4ExpertsPlan plan;
  const auto refuse = [&](std::string reason) {
    plan.reason = "one by one: " + reason;
    return plan;
  };
  if (s.dtype != DType::kFloat16 && s.dtype != DType::kBFloat16) return refuse("x is not of a 16-bit type");
  if (s.m == 0 || s.experts == 0 || s.n == 0 || s.k == 0) return refuse("nothing to multiply");
  if (!device.wgmma || device.smem_bytes < nf4_tiles::kSmemBytes) {
    return refuse(
        concat("compute capability ", device.architecture, device.architecture == 90 ? ", built without sm_90a" : ""));
  }
  if (s.experts > kMostExperts) return refuse(concat(s.experts, " experts, more than ", kMostExperts));
  if (s.k % 64 != 0 || s.n % 8 != 0) return refuse(concat("k is ", s.k, " and n ", s.n, ": no multiples of 64 and 8"));
  if (s.block_size < 64) return refuse(concat("block size ", s.block_size, ", below 64"));
  if (!s.aligned) return refuse("x, y or the codes are not aligned to 16 bytes");
  constexpr int64_t kMostSize = 1 << 30;
  if (s.m >= kMostSize || s.experts * s.n >= kMostSize || s.k >= kMostSize || s.experts * s.n * (s.k / 64) > UINT32_MAX)
    return refuse("a size of 2^30 or more");

  const int64_t out = s.transposed ? s.k : s.n, depth = s.transposed ? s.n : s.k;
  const int64_t strips = ceil_div(out, nf4_tiles::kTileOut);
  double best = 1e30;
  for (const nf4_tiles::Tile& tile : nf4_tiles::kTiles) {
    if (tile.fragments || (tile.tokens + tile.cluster != 64 + 1 && tile.tokens + tile.cluster != 128 + 1 &&
                           tile.tokens + tile.cluster != 256 + 2))
      continue;
    const int width = tile.tokens * tile.cluster;
    const double of_expert = static_cast<double>(s.m) / static_cast<double>(s.experts);
    const double columns = static_cast<double>(s.m) <= static_cast<double>(s.experts)
                               ? static_cast<double>(s.m)
                               : static_cast<double>(s.experts) * (of_expert / width + 0.5);
    const double units = std::max(columns, 1.0) * static_cast<double>(strips);
    const double waves = std::max(1.0, units / (device.sms / tile.cluster));
    const double cycles =
        waves * (static_cast<double>(ceil_div(depth, nf4_tiles::kStep)) * tile.step_cycles + nf4_tiles::kItemCycles);
    if (cycles < best) best = cycles, plan.tokens = tile.tokens, plan.cluster = tile.cluster;
  }
  plan.fused = true;
  plan.columns = s.m / (plan.tokens * plan.cluster) + std::min(s.m, s.experts);
  if (plan.columns * strips >= kMostSize) return refuse("more than 2^30 tiles");
  plan.workspace_bytes = (1 + plan.columns) * kColumnBytes;
  plan.reason = concat("tiles: ", nf4_tiles::kTileOut, " x ", plan.tokens, ", clusters of ", plan.cluster);
  return plan;
}

}  // namespace fastpeft::cuda
