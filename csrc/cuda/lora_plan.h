// How the small products of a LoRA linear are cut up: pure arithmetic on the host.
#pragma once

#include <algorithm>

#include "common/integer.h"
#include "cuda/device_limits.h"
#include "fastpeft/lora.h"

namespace fastpeft::cuda {

// Clusters of blocks, a block an SM, that run at the same time. A cluster lies within a GPC, whose SMs four do not
// always divide: an H100 of 132 SMs takes 66 of two, 30 of four and 15 of eight (cudaOccupancyMaxActiveClusters).
inline int resident_clusters(int cluster, const DeviceLimits& device) {
  const int most = device.sms / cluster;
  return cluster <= 2 ? most : most * 10 / 11;
}

namespace lora_xa {
constexpr int kTokens = 256;  // of a tile: eight warps of 32
constexpr int kChunk = 64;    // of the depth
constexpr int kMostRank = 64;

struct Plan {
  int tiles, cluster;  // of tokens; thread blocks that divide the depth
  int chunks;          // of the depth, of a thread block
  int blocks;
};
inline Plan make_plan(int64_t m, int64_t k, const DeviceLimits& device) {
  const int chunks = static_cast<int>(ceil_div(k, kChunk));
  Plan p{static_cast<int>(ceil_div(m, kTokens)), 1, chunks, 0};
  if (device.wgmma) {
    while (p.cluster < 8 && 2 * p.cluster <= chunks && p.tiles <= resident_clusters(2 * p.cluster, device))
      p.cluster *= 2;
  }
  p.chunks = static_cast<int>(ceil_div(chunks, p.cluster));
  p.blocks = p.cluster * std::min(p.tiles, std::max(1, resident_clusters(p.cluster, device)));
  return p;
}
}  // namespace lora_xa

namespace lora_dy {
constexpr int kColumns = 512;  // of dy, of a thread block
constexpr int kTokens = 32;    // of a step
constexpr int kMostRank = 64;

constexpr int kTmaTokens = 64;  // of a step of Hopper's own kernel

// Partial sums: dxa of each cluster of blocks of columns, dB of each slab of tokens.
struct Plan {
  int column_blocks, cluster;  // a multiple of cluster: blocks side by side whose sums of dxa meet
  int slabs;
  int slab_tokens;
};
inline Plan make_plan(int64_t m, int64_t n, const DeviceLimits& device) {
  Plan p{};
  const int64_t blocks = ceil_div(n, kColumns);
  p.cluster = 1;
  if (device.wgmma) {
    p.cluster = 4;  // unless it takes many blocks without columns, or more clusters than fit
    const auto padded = [&] { return ceil_div(blocks, p.cluster) * p.cluster; };
    while (p.cluster > 1 && (padded() - blocks > blocks / 8 ||
                             device.sms / padded() * (padded() / p.cluster) > resident_clusters(p.cluster, device))) {
      p.cluster /= 2;
    }
  }
  p.column_blocks = static_cast<int>(ceil_div(blocks, p.cluster)) * p.cluster;
  const int64_t most = std::max<int64_t>(1, device.sms / p.column_blocks);
  const int64_t step = device.wgmma ? kTmaTokens : kTokens;
  p.slab_tokens = static_cast<int>(ceil_div(ceil_div(m, most), step) * step);
  p.slabs = static_cast<int>(ceil_div(m, p.slab_tokens));
  return p;
}
constexpr int64_t stored_rank(int64_t r) { return r <= 16 ? 16 : r <= 32 ? 32 : kMostRank; }
inline int64_t workspace_bytes(const Plan& p, int64_t m, int64_t n, int64_t r) {
  return 4 * stored_rank(r) * (p.column_blocks / p.cluster * m + p.slabs * n);
}
}  // namespace lora_dy

namespace lora_da {
constexpr int kColumns = 256;  // of x, of a block of columns
constexpr int kTokens = 64;    // of a step
constexpr int kMostRank = 64;

struct Plan {
  int column_blocks, steps;  // of each
  int share;                 // steps of a thread block, the blocks of columns laid end to end
  int blocks;
};
inline Plan make_plan(int64_t m, int64_t k, const DeviceLimits& device) {
  Plan p{};
  p.column_blocks = static_cast<int>(ceil_div(k, kColumns)), p.steps = static_cast<int>(ceil_div(m, kTokens));
  p.share = static_cast<int>(ceil_div(int64_t{p.column_blocks} * p.steps, device.sms));
  p.blocks = static_cast<int>(ceil_div(int64_t{p.column_blocks} * p.steps, p.share));
  return p;
}
constexpr int64_t stored_rank(int64_t r) { return r <= 16 ? 16 : r <= 32 ? 32 : 64; }
// A partial sum of each share's piece of a block of columns; `rank`: of all adapters, padded.
inline int64_t workspace_bytes(const Plan& p, int64_t rank) {
  return 4 * stored_rank(rank) * kColumns * (p.blocks + p.column_blocks);
}
}  // namespace lora_da

}  // namespace fastpeft::cuda
