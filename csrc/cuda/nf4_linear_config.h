// Which kernel takes an NF4 product, and with which tiles: a pure function of sizes and device, tested without a GPU.
//
//   decode      m <= 16 forward: bound by reading the weight; nf4_linear_decode_kernel.cuh
//   fragments   Hopper, above that, forward: mostly up to 64 tokens; nf4_linear_fragments_kernel.cuh
//   tiles       Hopper, above that and backward; nf4_linear_tiles_kernel.cuh
//   mma         other GPUs since Ampere, and what has odd sizes or addresses; nf4_linear_mma_kernel.cuh
//   dequantise  the caller decodes the weight into a workspace and multiplies with the framework: float32, and sizes
//               for which mma loses by far and the decoded weight is small
#pragma once

#include <algorithm>
#include <string>

#include "common/error.h"
#include "common/integer.h"
#include "cuda/device_limits.h"
#include "cuda/nf4_linear_tiles_plan.h"
#include "fastpeft/nf4_linear.h"

namespace fastpeft::cuda {

namespace nf4_decode {
constexpr int kUnit = 16;             // rows of one mma
constexpr int kItemBytes = 16 * 128;  // of codes: 16 rows by 256 k, or 32 rows by 128 k
constexpr int kMostTokens = 16;
constexpr int kGroupWarps = 16;  // where there are several weights
constexpr int kStages = 3;       // items of a warp in its ring

// Shared memory lies in lines of 256 bytes. Of the first 256 lines the lower half is the table's, a pair of levels in
// each of the 32 banks, so that a byte of codes is the middle byte of its entry's address. The halves left over, and
// the lines from there on, hold items: 16 half lines each.
constexpr int kLineBytes = 256;
constexpr int kItemsInTable = 16;
constexpr int kTableBytes = 256 * kLineBytes;

constexpr int item_offset(int item) {
  const int beyond = item - kItemsInTable;
  return beyond < 0 ? item * 16 * kLineBytes + kLineBytes / 2
                    : kTableBytes + beyond / 2 * 16 * kLineBytes + beyond % 2 * (kLineBytes / 2);
}

// Units whose sums a warp holds at a time: two or four, a group.
constexpr int kMostGroupUnits = 4;

// Of the partial sums [token][row]: no bank conflicts in stores and loads.
constexpr int row_stride(int group_units) { return group_units * kUnit + 4; }

constexpr int ring_end(int warps) { return kTableBytes + (warps * kStages - kItemsInTable) / 2 * 16 * kLineBytes; }

// Staged scales of a group: its rows' 8-bit scales, one run of memory, and the nested scales that they take.
constexpr int staged_codes_bytes(int k, int group_units) {
  return static_cast<int>(ceil_div(static_cast<int64_t>(group_units) * k / 4, 128) * 128);
}
constexpr int staged_bytes(int k, int group_units) {
  return staged_codes_bytes(k, group_units) +
         static_cast<int>(ceil_div((staged_codes_bytes(k, group_units) / 256 + 3) * 4, 128) * 128);
}

constexpr int64_t smem_bytes(int m, int warps, int group_units, int64_t staged = 0) {
  return ring_end(warps) + 256 * 4 + staged + int64_t{4} * warps * m * row_stride(group_units);
}

struct Plan {
  int tiles = 0;  // of eight tokens
  int warps = 0;
  int blocks = 0;
  int group_blocks[kMostGroupedWeights] = {};  // of them, of each weight, where there are several
  int group_units = 0;
  bool staged = false;  // the scales go through shared memory
  int smem_bytes = 0;   // 0: there is no room
};

// Several weights are given by their `n_of`, up to the first that is 0.
inline Plan make_plan(int m, int n, int k, bool stage_scales, const DeviceLimits& device,
                      const int64_t (&n_of)[kMostGroupedWeights] = {}) {
  Plan plan;
  plan.tiles = m <= 8 ? 1 : 2;
  plan.warps = 16;
  plan.group_units = 4;
  const auto smem = [&](int64_t staged) { return nf4_decode::smem_bytes(m, plan.warps, plan.group_units, staged); };
  // Eight warps are what fits into the 99 KB of compute capability 8.6 and 8.9.
  if (smem(0) > device.smem_bytes) plan.warps = 8, plan.group_units = 2;
  if (smem(0) > device.smem_bytes) return plan;

  const int units = static_cast<int>(ceil_div(n, kUnit));
  plan.blocks = std::min(device.sms, units);
  int block_units = static_cast<int>(ceil_div(units, plan.blocks));
  if (n_of[0] > 0) {  // the fewest units a block with which all weights find their blocks
    for (;; ++block_units) {
      plan.blocks = 0;
      for (int i = 0; i < kMostGroupedWeights; ++i) {
        plan.blocks += plan.group_blocks[i] = static_cast<int>(ceil_div(ceil_div(n_of[i], kUnit), block_units));
      }
      if (plan.blocks <= device.sms) break;
    }
  }
  if (block_units <= 2) plan.group_units = 2;
  // Staged where a run of bytes holds a group's scales and there is room: for the next group's too, if there is one.
  if (stage_scales && k % 128 == 0 && k / 2 <= device.smem_bytes) {
    const auto staged = [&] { return staged_bytes(k, plan.group_units) * (block_units > plan.group_units ? 2 : 1); };
    const int group_units = plan.group_units;
    if (smem(staged()) > device.smem_bytes) plan.group_units = 2;
    plan.staged = smem(staged()) <= device.smem_bytes;
    if (plan.staged) {
      plan.smem_bytes = static_cast<int>(smem(staged()));
    } else {
      plan.group_units = group_units;
    }
  }
  if (!plan.staged) plan.smem_bytes = static_cast<int>(smem(0));
  return plan;
}
}  // namespace nf4_decode

struct NF4LinearSizes {
  int64_t m, n, k;
  bool transposed;  // y[m, k] = x[m, n] @ W
  int64_t block_size;
  DType dtype;
  bool aligned;                             // x and the codes lie at 16-byte boundaries
  bool aligned_scales;                      // the scales are of 8 bits and do so too
  int64_t rank = 0;                         // of an adapter that takes part, a multiple of 8; 0: none
  nf4_tiles::Beside beside{};               // what is made beside the product
  int64_t group[kMostGroupedWeights] = {};  // of n, where rows of several weights follow each other
};

enum class NF4LinearKernel : int { kDequantise, kDecode, kFragments, kTiles, kMma };

struct NF4LinearPlan {
  NF4LinearKernel kernel = NF4LinearKernel::kDequantise;
  nf4_decode::Plan decode;
  nf4_tiles::Plan tiles{};
  int64_t workspace_bytes = 0;
  int counters = 0;      // unsigned words, zero
  bool can_add = false;  // to y
  std::string reason;    // in words, for the person who asks why; of several weights: kDequantise is one by one
};

constexpr int kMmaSmemBytes = 82944;
constexpr int64_t kMostDecodedBytes = int64_t{32} << 20;  // of a weight that is decoded as a whole
constexpr int64_t kMmaTokens = 512;  // from here on the framework's product is several times faster than mma's

// Several weights in one launch: the kernels for few tokens take them, in their usual form.
inline NF4LinearPlan nf4_linear_group_plan(const NF4LinearSizes& s, const DeviceLimits& device) {
  NF4LinearPlan plan;
  plan.reason = "one by one";
  const int64_t n = s.group[0] + s.group[1] + s.group[2];
  if ((s.dtype != DType::kFloat16 && s.dtype != DType::kBFloat16) || s.m == 0 || device.architecture < 80 ||
      s.m > nf4_tiles::kMostFlatTokens || s.k % 256 != 0 || s.block_size != 64 || !s.aligned || !s.aligned_scales ||
      n >= (1 << 30) || s.k >= (1 << 30) || n * (s.k / 64) > INT32_MAX)
    return plan;
  for (const int64_t each : s.group) {
    if (each % nf4_tiles::kTileOut != 0) return plan;
  }
  const int m = static_cast<int>(s.m), k = static_cast<int>(s.k);
  if (m <= nf4_decode::kMostTokens) {
    plan.decode = nf4_decode::make_plan(m, static_cast<int>(n), k, true, device, s.group);
    if (plan.decode.staged && plan.decode.warps == nf4_decode::kGroupWarps) plan.kernel = NF4LinearKernel::kDecode;
  } else if (device.wgmma && device.smem_bytes >= nf4_tiles::kSmemBytes) {
    plan.tiles = nf4_tiles::make_flat_plan(m, static_cast<int>(n), k, device.sms);
    plan.kernel = NF4LinearKernel::kFragments;
    plan.workspace_bytes = nf4_tiles::workspace_bytes(plan.tiles);
    plan.counters = nf4_tiles::counters(plan.tiles);
  }
  if (plan.kernel != NF4LinearKernel::kDequantise) plan.reason = "together";
  return plan;
}

inline NF4LinearPlan nf4_linear_plan(const NF4LinearSizes& s, const DeviceLimits& device) {
  NF4LinearPlan plan;
  const auto dequantise = [&](std::string reason) {
    plan.reason = "dequantise: " + reason;
    return plan;
  };
  if (s.dtype != DType::kFloat16 && s.dtype != DType::kBFloat16) return dequantise("x is not of a 16-bit type");
  if (s.m == 0 || s.n == 0 || s.k == 0) return dequantise("nothing to multiply");
  if (device.architecture < 80) return dequantise(concat("compute capability ", device.architecture, ", below 80"));
  constexpr int64_t kMostSize = 1 << 30;
  if (s.m >= kMostSize || s.n >= kMostSize || s.k >= kMostSize) return dequantise("a size of 2^30 or more");

  std::string odd;  // why the fast kernels do not take it
  if (s.k % 64 != 0) {
    odd = concat("k is ", s.k, ", no multiple of 64");
  } else if (s.block_size < 64) {
    odd = concat("block size ", s.block_size, ", below 64");
  } else if (!s.aligned) {
    odd = "x or the codes are not aligned to 16 bytes";
  } else if (s.n * (s.k / 64) > INT32_MAX) {
    odd = "more than 2^31 blocks of 64";
  }
  const int m = static_cast<int>(s.m), n = static_cast<int>(s.n), k = static_cast<int>(s.k);
  if (s.rank > nf4_tiles::kMostRank) return dequantise(concat("an adapter of rank ", s.rank));
  if (odd.empty() && !s.transposed && s.m <= nf4_decode::kMostTokens && s.rank == 0) {
    plan.decode = nf4_decode::make_plan(m, n, k, s.aligned_scales && s.block_size == 64, device);
    if (plan.decode.smem_bytes > 0) {
      plan.kernel = NF4LinearKernel::kDecode;
      plan.can_add = plan.decode.staged;
      plan.reason = concat("decode: ", plan.decode.tiles, " x 8 tokens, ", plan.decode.warps, " warps, ",
                           plan.decode.blocks, " blocks");
      return plan;
    }
  }
  if (odd.empty() && s.transposed && s.n % 8 != 0) odd = concat("n is ", s.n, ", no multiple of 8");
  if (odd.empty() && device.wgmma && device.smem_bytes >= nf4_tiles::kSmemBytes) {
    plan.tiles = nf4_tiles::make_plan(m, s.transposed ? k : n, s.transposed ? n : k, device.sms, !s.transposed,
                                      s.rank > 0 ? nf4_tiles::kAdapterTokens : 0, s.beside);
    plan.kernel = plan.tiles.fragments ? NF4LinearKernel::kFragments : NF4LinearKernel::kTiles;
    plan.workspace_bytes = nf4_tiles::workspace_bytes(plan.tiles);
    plan.counters = nf4_tiles::counters(plan.tiles);
    plan.can_add = plan.tiles.fragments && s.n % 8 == 0;
    plan.reason = concat(plan.tiles.fragments ? "fragments: " : "tiles: ", nf4_tiles::kTileOut, " x ",
                         plan.tiles.tokens, ", clusters of ", plan.tiles.cluster, ", ", nf4_tiles::grid(plan.tiles),
                         " blocks, ", plan.tiles.whole_waves, " whole waves, ", plan.tiles.shared, " shared units",
                         s.rank > 0 ? concat(", rank ", s.rank) : "",
                         plan.tiles.beside_blocks > 0 ? concat(", ", plan.tiles.beside_blocks, " beside") : "");
    return plan;
  }
  if (odd.empty())
    odd = concat("compute capability ", device.architecture, device.architecture == 90 ? ", built without sm_90a" : "");
  if (s.rank > 0) return dequantise("an adapter, " + odd);
  if (s.m >= kMmaTokens && s.n * s.k * 2 <= kMostDecodedBytes) return dequantise(concat("m is ", s.m, ", ", odd));
  if (device.smem_bytes < kMmaSmemBytes)
    return dequantise(concat("only ", device.smem_bytes, " bytes of shared memory"));
  plan.kernel = NF4LinearKernel::kMma;
  plan.reason = "mma: " + odd;
  return plan;
}

}  // namespace fastpeft::cuda
