// How the RMSNorm kernels share rows among threads and sum over them (rms_norm_config.h).
#pragma once

#include <cstdint>

#include "cuda/device/numbers.cuh"
#include "cuda/rms_norm_config.h"

namespace fastpeft::cuda::norm {

template <typename T>
constexpr int kEach = 16 / static_cast<int>(sizeof(T));

// kP, the packs of a row that a thread has, tells the kernels apart: one where rows share a warp.
template <int kP>
constexpr bool kWide = kP > 1;
template <int kP>
constexpr int kRows = kWide<kP> ? 1 : kRmsNormNarrowRows;
template <int kP>
constexpr int kMostThreads = kWide<kP> ? kRmsNormMostThreads : kRmsNormNarrowThreads;

constexpr int kMostWarps = kRmsNormMostThreads / 32;

__device__ inline float sum_lanes(float v, int lanes) {
  for (int distance = lanes / 2; distance > 0; distance /= 2) v += __shfl_xor_sync(~0u, v, distance);
  return v;
}

// Sum over the whole block, in every thread. `warp_sums` may be written again after one more barrier.
__device__ inline float sum_block(float v, float* warp_sums) {
  v = sum_lanes(v, 32);
  if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = v;
  __syncthreads();
  const unsigned from = threadIdx.x % kMostWarps;
  return sum_lanes(from < blockDim.x / 32 ? warp_sums[from] : 0.0f, kMostWarps);
}

template <int kP>
__device__ float sum_row(float v, int lanes, float* warp_sums) {
  return kWide<kP> ? sum_block(v, warp_sums) : sum_lanes(v, lanes);
}

template <typename T>
__device__ float rounded(float x) {
  return to_float(from_float<T>(x));
}

// Which row of each `groups` a thread has a part of, and which packs.
template <int kP>
struct Seat {
  int lanes, lane, group, groups;

  __device__ explicit Seat(int lanes_log2) {
    lanes = kWide<kP> ? static_cast<int>(blockDim.x) : 1 << lanes_log2;
    lane = kWide<kP> ? static_cast<int>(threadIdx.x) : static_cast<int>(threadIdx.x) & (lanes - 1);
    group = kWide<kP> ? 0 : static_cast<int>(threadIdx.x) >> lanes_log2;
    groups = kWide<kP> ? 1 : static_cast<int>(blockDim.x) >> lanes_log2;
  }
  __device__ int pack(int i) const { return lane + i * lanes; }
};

}  // namespace fastpeft::cuda::norm
