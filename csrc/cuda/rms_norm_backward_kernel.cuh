// The backward of RMSNorm where a row lies in the registers of its threads: dx, and with a trained weight its gradient.
//
// dx       rstd * (dy * w - n * mean(dy * w * n)) + dh, with n = h * rstd; dh: what comes of the residual sum, if any
// dweight  Blocks stay resident and add up dy * n of their rows in registers, while the next rows are on their way;
//          each writes one row of partial sums, which a second kernel adds in a fixed order. There are two blocks of
//          256 threads an SM, as one block's rows arrive while the other sums over its own: one of 512 threads took 11
//          to 12% longer with all the rows ahead that fit (bench/LOG.md, 2026-11-26, "Block kernels: hints, shapes and
//          what is asked for early").
#pragma once

#include <cstdint>

#include "cuda/device/hopper.cuh"
#include "cuda/device/numbers.cuh"
#include "cuda/device/ptx.cuh"
#include "cuda/rms_norm_row.cuh"
#include "fastpeft/rms_norm.h"

namespace fastpeft::cuda::norm {

// A thread's part of the weight: in registers, or read anew from L1 at each use where four packs of each tensor leave
// none.
template <typename W, int kN, int kP>
struct WeightPart {
  Pack<W, kN> w[kP];

  __device__ WeightPart(const void* weight, const Seat<kP>& seat, int packs) {
#pragma unroll
    for (int i = 0; i < kP; ++i) {
      w[i] = load_pack_if<W, kN>(seat.pack(i) < packs, static_cast<const W*>(weight) + seat.pack(i) * kN);
    }
  }
  __device__ const Pack<W, kN>& operator[](int i) {
    keep_packed(w[i]);
    return w[i];
  }
};
template <typename W, int kN>
struct WeightPart<W, kN, kRmsNormMostPacks> {
  const W* weight;
  const Seat<kRmsNormMostPacks>& seat;
  int packs;

  __device__ WeightPart(const void* from, const Seat<kRmsNormMostPacks>& seat, int packs)
      : weight(static_cast<const W*>(from)), seat(seat), packs(packs) {}
  __device__ Pack<W, kN> operator[](int i) const {
    return load_pack_if<W, kN>(seat.pack(i) < packs, weight + seat.pack(i) * kN);
  }
};

// What a thread has of a row of the backward.
template <typename T, int kP, bool kDh>
struct BackwardPart {
  static constexpr int kN = kEach<T>;
  Pack<T, kN> dy[kP], h[kP], dh[kP];
  float rstd;

  __device__ void load(const RmsNormBackwardArgs& args, const Seat<kP>& seat, int64_t row, int packs) {
    const bool mine = row < args.shape.rows;
    const T* dy_row = static_cast<const T*>(args.dy) + row * args.dy_stride;
    const T* h_row = static_cast<const T*>(args.h) + row * args.h_stride;
    const T* dh_row = static_cast<const T*>(args.dh) + row * args.dh_stride;
#pragma unroll
    for (int i = 0; i < kP; ++i) {
      const bool here = mine && seat.pack(i) < packs;
      dy[i] = load_pack_if<T, kN>(here, dy_row + seat.pack(i) * kN);
      h[i] = load_pack_if<T, kN>(here, h_row + seat.pack(i) * kN);
    }
    rstd = mine ? load_4(static_cast<const float*>(args.rstd) + row) : 0.0f;
#pragma unroll
    for (int i = 0; i < kP; ++i) {
      const bool here = mine && seat.pack(i) < packs && kDh;
      dh[i] = load_pack_if<T, kN>(here, dh_row + seat.pack(i) * kN);
    }
  }

  // Pack i's part of the sum over dy * weight * n.
  template <typename W>
  __device__ float product(int i, const Pack<W, kN>& weight, float offset) const {
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < kN; ++j) {
      const float g = to_float(dy[i].values[j]) * (to_float(weight.values[j]) + offset);
      sum += g * (to_float(h[i].values[j]) * rstd);
    }
    return sum;
  }

  // dy * n of pack i, with n as the forward rounded it.
  __device__ void for_weight(int i, bool cast_first, float (&to)[kN]) const {
#pragma unroll
    for (int j = 0; j < kN; ++j) {
      const float n = to_float(h[i].values[j]) * rstd;
      to[j] = to_float(dy[i].values[j]) * (cast_first ? rounded<T>(n) : n);
    }
  }

  template <typename W>
  __device__ void store(const RmsNormBackwardArgs& args, const Seat<kP>& seat, int64_t row, int packs,
                        WeightPart<W, kN, kP>& w, float mean, float offset) {
    T* dx_row = static_cast<T*>(args.dx) + row * args.shape.width;
#pragma unroll
    for (int i = 0; i < kP; ++i) {
      keep_packed(dy[i]), keep_packed(h[i]);
      const Pack<W, kN> weight = w[i];
      Pack<T, kN> dx;
#pragma unroll
      for (int j = 0; j < kN; ++j) {
        const float n = to_float(h[i].values[j]) * rstd;
        const float g = to_float(dy[i].values[j]) * (to_float(weight.values[j]) + offset);
        dx.values[j] = from_float<T>(rstd * (g - n * mean) + to_float(dh[i].values[j]));
      }
      store_pack_if(row < args.shape.rows && seat.pack(i) < packs, dx_row + seat.pack(i) * kN, dx);
    }
  }
};

template <typename T, typename W, int kP, bool kDh>
__global__ void __launch_bounds__(kMostThreads<kP>) backward_kernel(const __grid_constant__ RmsNormBackwardArgs args,
                                                                    int lanes_log2, float inverse_width, float offset) {
  constexpr int kN = kEach<T>, kR = kRows<kP>;
  __shared__ float warp_sums[kMostWarps];
  let_next_kernel_start();
  wait_for_kernel_before();
  const Seat<kP> seat(lanes_log2);
  const int packs = static_cast<int>(args.shape.width / kN);
  const int64_t first = blockIdx.x * static_cast<int64_t>(seat.groups * kR) + seat.group;
  BackwardPart<T, kP, kDh> parts[kR];
#pragma unroll
  for (int r = 0; r < kR; ++r) parts[r].load(args, seat, first + r * seat.groups, packs);
  WeightPart<W, kN, kP> w(args.weight, seat, packs);
#pragma unroll
  for (int r = 0; r < kR; ++r) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kP; ++i) sum += parts[r].product(i, w[i], offset);
    const float mean = sum_row<kP>(sum, seat.lanes, warp_sums) * inverse_width;
    parts[r].store(args, seat, first + r * seat.groups, packs, w, mean, offset);
  }
}

// Sums of dy * n over the rows, of the columns that a thread has: in registers, or in shared memory where four packs of
// each tensor leave none.
template <int kN, int kP>
struct ColumnSums {
  alignas(16) float sums[kP][kN] = {};

  __device__ void add(int i, const float (&v)[kN]) {
#pragma unroll
    for (int j = 0; j < kN; ++j) sums[i][j] += v[j];
  }
  __device__ void store(int i, float* to) const { store_pack(to, reinterpret_cast<const Pack<float, kN>&>(sums[i])); }
};
extern __shared__ __align__(16) float shared_sums[];
template <int kN>
struct ColumnSums<kN, kRmsNormMostPacks> {
  // Neighbouring threads have neighbouring words of 16 bytes.
  __device__ static uint32_t at(int i, int quarter) {
    return shared_offset(shared_sums) + 16 * ((i * (kN / 4) + quarter) * blockDim.x + threadIdx.x);
  }
  __device__ ColumnSums() {
#pragma unroll
    for (int i = 0; i < kRmsNormMostPacks; ++i) {
#pragma unroll
      for (int q = 0; q < kN / 4; ++q) store_shared(at(i, q), uint4{0, 0, 0, 0});
    }
  }
  __device__ void add(int i, const float (&v)[kN]) {
#pragma unroll
    for (int q = 0; q < kN / 4; ++q) {
      uint4 sum = load_shared(at(i, q));
      float4& sums = reinterpret_cast<float4&>(sum);
      sums.x += v[4 * q], sums.y += v[4 * q + 1], sums.z += v[4 * q + 2], sums.w += v[4 * q + 3];
      store_shared(at(i, q), sum);
    }
  }
  __device__ void store(int i, float* to) const {
#pragma unroll
    for (int q = 0; q < kN / 4; ++q) reinterpret_cast<uint4*>(to)[q] = load_shared(at(i, q));
  }
};

// Floats of shared memory a thread: for these sums, or for adding up those of the groups of threads that share rows.
template <int kN, int kP>
constexpr int kSharedSums = kP == 1 || kP == kRmsNormMostPacks ? kP * kN : 0;

// Rows that a thread has on their way beside the sums: two where the registers suffice.
template <int kP, bool kDh>
constexpr int kRowsAhead = kP == kRmsNormMostPacks || kDh ? 1 : 2;

template <typename T, typename W, int kP, bool kDh>
__global__ void __launch_bounds__(kMostThreads<kP>, kWide<kP> ? 1 : kRmsNormNarrowBlocksAnSm)
    dweight_kernel(const __grid_constant__ RmsNormBackwardArgs args, int lanes_log2, float inverse_width,
                   float offset) {
  constexpr int kN = kEach<T>, kDepth = kRowsAhead<kP, kDh>;
  __shared__ float warp_sums[2][kMostWarps];  // in turns, so that a row costs one barrier
  let_next_kernel_start();
  wait_for_kernel_before();
  const Seat<kP> seat(lanes_log2);
  const int packs = static_cast<int>(args.shape.width / kN);
  const int64_t step = gridDim.x * static_cast<int64_t>(seat.groups);
  int64_t first = blockIdx.x * static_cast<int64_t>(seat.groups);
  BackwardPart<T, kP, kDh> parts[kDepth];
#pragma unroll
  for (int d = 0; d < kDepth; ++d) parts[d].load(args, seat, first + d * step + seat.group, packs);
  WeightPart<W, kN, kP> w(args.weight, seat, packs);
  ColumnSums<kN, kP> sums;
  int turn = 0;
  while (first < args.shape.rows) {
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
      if (first >= args.shape.rows) break;
      BackwardPart<T, kP, kDh>& part = parts[d];
      float sum = 0.0f;
#pragma unroll
      for (int i = 0; i < kP; ++i) {
        // Behind the sums of the pack before, else the compiler converts all packs at once and runs out of registers.
        if constexpr (kP == kRmsNormMostPacks) keep_packed(part.dy[i]), keep_packed(part.h[i]), keep_packed(part.dh[i]);
        sum += part.product(i, w[i], offset);
        float for_weight[kN];
        part.for_weight(i, args.shape.cast_first, for_weight);
        sums.add(i, for_weight);
      }
      const float mean = sum_row<kP>(sum, seat.lanes, warp_sums[turn]) * inverse_width;
      turn ^= 1;
      part.store(args, seat, first + seat.group, packs, w, mean, offset);
      part.load(args, seat, first + kDepth * step + seat.group, packs);
      first += step;
    }
  }
  float* partial_row = static_cast<float*>(args.partials) + blockIdx.x * args.shape.width;
  if constexpr (kWide<kP>) {
#pragma unroll
    for (int i = 0; i < kP; ++i) {
      if (seat.pack(i) < packs) sums.store(i, partial_row + seat.pack(i) * kN);
    }
  } else {
    // Neighbouring threads have neighbouring words.
#pragma unroll
    for (int j = 0; j < kN; ++j) shared_sums[j * kRmsNormNarrowThreads + threadIdx.x] = sums.sums[0][j];
    __syncthreads();
    for (int column = threadIdx.x; column < packs * kN; column += kRmsNormNarrowThreads) {
      const float* from = shared_sums + column % kN * kRmsNormNarrowThreads + column / kN;
      float sum = 0.0f;
      for (int group = 0; group < seat.groups; ++group) sum += from[group * seat.lanes];
      partial_row[column] = sum;
    }
  }
}

constexpr int kSumColumns = 32;
constexpr int kSumSlices = 32;

// dweight[i] = the sum of column i of the partials. Warps take every 32nd row, then their sums are added in order.
template <typename W>
__global__ void __launch_bounds__(kSumColumns* kSumSlices)
    sum_partials_kernel(const float* partials, int64_t rows, int64_t width, W* dweight) {
  __shared__ float of_slice[kSumSlices][kSumColumns];
  let_next_kernel_start();
  wait_for_kernel_before();
  const int slice = threadIdx.x / kSumColumns, lane = threadIdx.x % kSumColumns;
  const int64_t column = blockIdx.x * static_cast<int64_t>(kSumColumns) + lane;
  float sum = 0.0f;
  if (column < width) {
#pragma unroll 8
    for (int64_t row = slice; row < rows; row += kSumSlices) sum += partials[row * width + column];
  }
  of_slice[slice][lane] = sum;
  __syncthreads();
  if (slice != 0 || column >= width) return;
#pragma unroll
  for (int i = 1; i < kSumSlices; ++i) sum += of_slice[i][lane];
  dweight[column] = from_float<W>(sum);
}

}  // namespace fastpeft::cuda::norm
