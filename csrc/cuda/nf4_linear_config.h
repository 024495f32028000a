// Which kernel takes an NF4 product, and with which tiles: a pure function of sizes and device, tested without a GPU.
//
//   decode      m <= 16: bound by reading the weight; nf4_linear_decode_kernel.cuh
//   dequantise  everything else: the caller decodes into a workspace and multiplies with the framework
#pragma once

#include <algorithm>
#include <string>

#include "common/error.h"
#include "common/integer.h"
#include "cuda/device_limits.h"
#include "fastpeft/types.h"

namespace fastpeft::cuda {

namespace nf4_decode {
constexpr int kUnit = 16;              // rows of one mma
constexpr int kPair = 2 * kUnit;       // rows of an item
constexpr int kItemK = 128;            // k of an item: two halves of 64
constexpr int kRowBytes = kItemK / 2;  // of an item
constexpr int kItemBytes = kPair * kRowBytes;
constexpr int kTableBytes = 256 * 32 * 4;  // 256 pairs of levels, a copy in each of the 32 banks
constexpr int kRowStride = 36;             // of the partial sums [token][row]: no bank conflicts in stores and loads
constexpr int kMostTokens = 16;
constexpr int kStages = 3;  // items of a warp in its ring

constexpr int partial_floats(int tiles, int warps) { return warps * 8 * tiles * kRowStride; }

constexpr int smem_bytes(int tiles, int warps) {
  return kTableBytes + warps * kStages * kItemBytes + (partial_floats(tiles, warps) + 256) * 4;
}
}  // namespace nf4_decode

struct NF4LinearPlan {
  bool decode = false;  // else dequantise
  int tiles = 0;        // of eight tokens
  int warps = 0;
  int blocks = 0;
  std::string reason;  // in words, for the person who asks why
};

// `aligned`: x and the codes lie at 16-byte boundaries.
inline NF4LinearPlan nf4_linear_plan(int64_t m, int64_t n, int64_t k, int64_t block_size, DType dtype, bool aligned,
                                     const DeviceLimits& device) {
  const auto dequantise = [](std::string reason) {
    NF4LinearPlan plan;
    plan.reason = "dequantise: " + reason;
    return plan;
  };
  if (dtype != DType::kFloat16 && dtype != DType::kBFloat16) return dequantise("x is not of a 16-bit type");
  if (m > nf4_decode::kMostTokens) return dequantise(concat("m is ", m, ", more than ", nf4_decode::kMostTokens));
  if (m == 0 || n == 0) return dequantise("nothing to multiply");
  if (k % 64 != 0 || k == 0) return dequantise(concat("k is ", k, ", no multiple of 64"));
  if (block_size < 64) return dequantise(concat("block size ", block_size, ", below 64"));
  if (!aligned) return dequantise("x or the codes are not aligned to 16 bytes");
  if (n > INT32_MAX || k > INT32_MAX || n * k / block_size > UINT32_MAX) return dequantise("sizes beyond 32 bits");
  if (device.architecture < 80) return dequantise(concat("compute capability ", device.architecture, ", below 80"));

  NF4LinearPlan plan;
  plan.decode = true;
  plan.tiles = m <= 8 ? 1 : 2;
  plan.warps = 16;
  // Eight warps are what fits into the 99 KB of compute capability 8.6 and 8.9.
  if (nf4_decode::smem_bytes(plan.tiles, plan.warps) > device.smem_bytes) plan.warps = 8;
  if (nf4_decode::smem_bytes(plan.tiles, plan.warps) > device.smem_bytes) {
    return dequantise(concat("only ", device.smem_bytes, " bytes of shared memory"));
  }
  plan.blocks = static_cast<int>(std::min<int64_t>(device.sms, ceil_div(n, nf4_decode::kUnit)));
  plan.reason = concat("decode: ", plan.tiles, " x 8 tokens, ", plan.warps, " warps, ", plan.blocks, " blocks");
  return plan;
}

}  // namespace fastpeft::cuda
