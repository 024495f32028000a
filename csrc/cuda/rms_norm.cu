// RMSNorm on CUDA, with the residual add before it and the gradients of both: every tensor is read and written once.
//
// Plan     A row lies in the registers of its threads (rms_norm_config.h), so it is read once although it is needed
//          before and after the sum over it. All loads of a row stand before the first use. Weights come from L1, which
//          the rows are kept out of.
// dweight  Blocks stay resident and add up their rows in shared memory; each writes one row of partial sums, which a
//          second kernel adds in a fixed order.
// Limits   Rows of whole 16-byte packs on the 16-byte grid, up to 2048 packs; the general kernels take the rest.
#include "fastpeft/rms_norm.h"

#include "common/rms_norm_checks.h"
#include "cuda/device/launch.cuh"
#include "cuda/device/numbers.cuh"
#include "cuda/device/ptx.cuh"
#include "cuda/rms_norm_config.h"

namespace fastpeft::cuda {
namespace {

template <typename T>
constexpr int kEach = 16 / static_cast<int>(sizeof(T));

template <bool kWide>
constexpr int kPacks = kWide ? kRmsNormWidePacks : kRmsNormNarrowPacks;

template <bool kWide>
constexpr int kThreads = kWide ? kRmsNormMostThreads : kRmsNormNarrowThreads;

constexpr int kMostWarps = kRmsNormMostThreads / 32;

// --- kernels ---------------------------------------------------------------------------------------------------------

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

template <bool kWide>
__device__ float sum_row(float v, int lanes, float* warp_sums) {
  return kWide ? sum_block(v, warp_sums) : sum_lanes(v, lanes);
}

template <typename T>
__device__ float rounded(float x) {
  return to_float(from_float<T>(x));
}

// Which row, and which of its packs, a thread has.
template <bool kWide>
struct Seat {
  int lanes, lane, group, groups;

  __device__ explicit Seat(int lanes_log2) {
    lanes = kWide ? static_cast<int>(blockDim.x) : 1 << lanes_log2;
    lane = kWide ? static_cast<int>(threadIdx.x) : static_cast<int>(threadIdx.x) & (lanes - 1);
    group = kWide ? 0 : static_cast<int>(threadIdx.x) >> lanes_log2;
    groups = kWide ? 1 : static_cast<int>(blockDim.x) >> lanes_log2;
  }
  __device__ int pack(int i) const { return lane + i * lanes; }
};

template <typename T, typename W, bool kWide, bool kResidual>
__global__ void __launch_bounds__(kThreads<kWide>)
    forward_kernel(const __grid_constant__ RmsNormArgs args, int lanes_log2, float inverse_width, float eps,
                   float offset) {
  constexpr int kN = kEach<T>, kP = kPacks<kWide>;
  __shared__ float warp_sums[kMostWarps];
  let_next_kernel_start();
  wait_for_kernel_before();
  const Seat<kWide> seat(lanes_log2);
  const int64_t width = args.shape.width;
  const int packs = static_cast<int>(width / kN);
  const int64_t row = blockIdx.x * static_cast<int64_t>(seat.groups) + seat.group;
  const bool mine = kWide || row < args.shape.rows;

  const T* x_row = static_cast<const T*>(args.x) + row * args.x_stride;
  const W* weight = static_cast<const W*>(args.weight);
  bool here[kP];
#pragma unroll
  for (int i = 0; i < kP; ++i) here[i] = mine && seat.pack(i) < packs;
  Pack<T, kN> x[kP];
#pragma unroll
  for (int i = 0; i < kP; ++i) x[i] = load_pack_once_if<T, kN>(here[i], x_row + seat.pack(i) * kN);
  if constexpr (kResidual) {
    const T* residual_row = static_cast<const T*>(args.residual) + row * args.residual_stride;
    T* h_row = static_cast<T*>(args.h) + row * width;
    Pack<T, kN> residual[kP];
#pragma unroll
    for (int i = 0; i < kP; ++i) {
      residual[i] = load_pack_once_if<T, kN>(here[i], residual_row + seat.pack(i) * kN);
    }
#pragma unroll
    for (int i = 0; i < kP; ++i) {
#pragma unroll
      for (int j = 0; j < kN; ++j) {
        x[i].values[j] = from_float<T>(to_float(x[i].values[j]) + to_float(residual[i].values[j]));
      }
      store_pack_if(here[i], h_row + seat.pack(i) * kN, x[i]);
    }
  }
  Pack<W, kN> w[kP];
#pragma unroll
  for (int i = 0; i < kP; ++i) w[i] = load_pack_if<W, kN>(here[i], weight + seat.pack(i) * kN);
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kP; ++i) {
#pragma unroll
    for (int j = 0; j < kN; ++j) sum += to_float(x[i].values[j]) * to_float(x[i].values[j]);
  }
  const float rstd = rsqrtf(sum_row<kWide>(sum, seat.lanes, warp_sums) * inverse_width + eps);
  if (mine && seat.lane == 0) static_cast<float*>(args.rstd)[row] = rstd;
  T* y_row = static_cast<T*>(args.y) + row * width;
#pragma unroll
  for (int i = 0; i < kP; ++i) keep_packed(x[i]);
#pragma unroll
  for (int i = 0; i < kP; ++i) {
    Pack<T, kN> y;
#pragma unroll
    for (int j = 0; j < kN; ++j) {
      float n = to_float(x[i].values[j]) * rstd;
      if (args.shape.cast_first) n = rounded<T>(n);
      y.values[j] = from_float<T>(n * (to_float(w[i].values[j]) + offset));
    }
    store_pack_if(here[i], y_row + seat.pack(i) * kN, y);
  }
}

// Sums of dy * n that a thread keeps for its columns, in shared memory: in registers they would cost the loads their
// room. Neighbouring threads have neighbouring words, so no two of a warp meet in a bank.
__device__ inline int column_sum(int element, int thread) { return element * static_cast<int>(blockDim.x) + thread; }

template <typename T, typename W, bool kWide, bool kDWeight>
__global__ void __launch_bounds__(kThreads<kWide>) backward_kernel(const __grid_constant__ RmsNormBackwardArgs args,
                                                                   int lanes_log2, float inverse_width, float offset) {
  constexpr int kN = kEach<T>, kP = kPacks<kWide>;
  __shared__ float warp_sums[2][kMostWarps];  // in turns, so that a row costs one barrier
  extern __shared__ float column_sums[];
  [[maybe_unused]] const int thread = threadIdx.x;
  if constexpr (kDWeight) {
#pragma unroll
    for (int i = 0; i < kP * kN; ++i) column_sums[column_sum(i, thread)] = 0.0f;
  }
  let_next_kernel_start();
  wait_for_kernel_before();
  const Seat<kWide> seat(lanes_log2);
  const int64_t width = args.shape.width;
  const int packs = static_cast<int>(width / kN);
  const W* weight = static_cast<const W*>(args.weight);
  int turn = 0;
  for (int64_t first = blockIdx.x * static_cast<int64_t>(seat.groups); first < args.shape.rows;
       first += gridDim.x * static_cast<int64_t>(seat.groups)) {
    const int64_t row = first + seat.group;
    const bool mine = kWide || row < args.shape.rows;
    const T* dy_row = static_cast<const T*>(args.dy) + row * args.dy_stride;
    const T* h_row = static_cast<const T*>(args.h) + row * args.h_stride;
    const T* dh_row = static_cast<const T*>(args.dh) + row * args.dh_stride;
    const bool with_dh = args.dh != nullptr;
    bool here[kP];
#pragma unroll
    for (int i = 0; i < kP; ++i) here[i] = mine && seat.pack(i) < packs;
    Pack<T, kN> dy[kP], h[kP], dh[kP];
#pragma unroll
    for (int i = 0; i < kP; ++i) {
      dy[i] = load_pack_once_if<T, kN>(here[i], dy_row + seat.pack(i) * kN);
      h[i] = load_pack_once_if<T, kN>(here[i], h_row + seat.pack(i) * kN);
    }
    const float rstd = mine ? load_4(static_cast<const float*>(args.rstd) + row) : 0.0f;
#pragma unroll
    for (int i = 0; i < kP; ++i) {
      dh[i] = load_pack_once_if<T, kN>(with_dh && here[i], dh_row + seat.pack(i) * kN);
    }
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kP; ++i) {
      if (!here[i]) break;
      const auto w = load_pack<W, kN>(weight + seat.pack(i) * kN);
#pragma unroll
      for (int j = 0; j < kN; ++j) {
        const float n = to_float(h[i].values[j]) * rstd;
        sum += to_float(dy[i].values[j]) * (to_float(w.values[j]) + offset) * n;
        if constexpr (kDWeight) {
          column_sums[column_sum(i * kN + j, thread)] +=
              to_float(dy[i].values[j]) * (args.shape.cast_first ? rounded<T>(n) : n);
        }
      }
    }
    const float mean = sum_row<kWide>(sum, seat.lanes, warp_sums[turn]) * inverse_width;
    turn ^= 1;
#pragma unroll
    for (int i = 0; i < kP; ++i) keep_packed(dy[i]), keep_packed(h[i]);
    T* dx_row = static_cast<T*>(args.dx) + row * width;
#pragma unroll
    for (int i = 0; i < kP; ++i) {
      if (!here[i]) break;
      // Read again rather than kept: the registers are worth more, and it is in L1.
      const auto w = load_pack<W, kN>(weight + seat.pack(i) * kN);
      Pack<T, kN> dx;
#pragma unroll
      for (int j = 0; j < kN; ++j) {
        const float n = to_float(h[i].values[j]) * rstd;
        const float g = to_float(dy[i].values[j]) * (to_float(w.values[j]) + offset);
        dx.values[j] = from_float<T>(rstd * (g - n * mean) + to_float(dh[i].values[j]));
      }
      store_pack_if(true, dx_row + seat.pack(i) * kN, dx);
    }
  }
  if constexpr (kDWeight) {
    __syncthreads();
    float* partial_row = static_cast<float*>(args.partials) + blockIdx.x * width;
    for (int column = thread; column < packs * kN; column += blockDim.x) {
      const int pack = column / kN;
      const int element = pack / seat.lanes * kN + column % kN;
      float v = 0.0f;
      for (int group = 0; group < seat.groups; ++group) {
        v += column_sums[column_sum(element, group * seat.lanes + pack % seat.lanes)];
      }
      partial_row[column] = v;
    }
  }
}

// A row a block, element by element: any width, any alignment.
template <typename T, typename W>
__global__ void __launch_bounds__(kRmsNormGeneralThreads)
    general_forward_kernel(const __grid_constant__ RmsNormArgs args, float inverse_width, float eps, float offset) {
  __shared__ float warp_sums[2][kMostWarps];
  let_next_kernel_start();
  wait_for_kernel_before();
  const int64_t width = args.shape.width;
  const W* weight = static_cast<const W*>(args.weight);
  int turn = 0;
  for (int64_t row = blockIdx.x; row < args.shape.rows; row += gridDim.x) {
    const T* x = static_cast<const T*>(args.x) + row * args.x_stride;
    const T* residual = static_cast<const T*>(args.residual) + row * args.residual_stride;
    T* h = static_cast<T*>(args.h) + row * width;
    T* y = static_cast<T*>(args.y) + row * width;
    float sum = 0.0f;
    for (int64_t i = threadIdx.x; i < width; i += blockDim.x) {
      float v = to_float(x[i]);
      if (args.residual != nullptr) {
        h[i] = from_float<T>(v + to_float(residual[i]));
        v = to_float(h[i]);
      }
      sum += v * v;
    }
    const float rstd = rsqrtf(sum_block(sum, warp_sums[turn]) * inverse_width + eps);
    turn ^= 1;
    if (threadIdx.x == 0) static_cast<float*>(args.rstd)[row] = rstd;
    const T* normed = args.residual != nullptr ? h : x;  // a thread reads the elements that it wrote
    for (int64_t i = threadIdx.x; i < width; i += blockDim.x) {
      float n = to_float(normed[i]) * rstd;
      if (args.shape.cast_first) n = rounded<T>(n);
      y[i] = from_float<T>(n * (to_float(weight[i]) + offset));
    }
  }
}

template <typename T, typename W>
__global__ void __launch_bounds__(kRmsNormGeneralThreads)
    general_backward_kernel(const __grid_constant__ RmsNormBackwardArgs args, float inverse_width, float offset) {
  __shared__ float warp_sums[2][kMostWarps];
  let_next_kernel_start();
  wait_for_kernel_before();
  const int64_t width = args.shape.width;
  const W* weight = static_cast<const W*>(args.weight);
  float* partial = args.dweight == nullptr ? nullptr : static_cast<float*>(args.partials) + blockIdx.x * width;
  int turn = 0;
  for (int64_t row = blockIdx.x; row < args.shape.rows; row += gridDim.x) {
    const T* dy = static_cast<const T*>(args.dy) + row * args.dy_stride;
    const T* h = static_cast<const T*>(args.h) + row * args.h_stride;
    const T* dh = static_cast<const T*>(args.dh) + row * args.dh_stride;
    T* dx = static_cast<T*>(args.dx) + row * width;
    const float rstd = static_cast<const float*>(args.rstd)[row];
    const bool first = row == blockIdx.x;
    float sum = 0.0f;
    for (int64_t i = threadIdx.x; i < width; i += blockDim.x) {
      const float n = to_float(h[i]) * rstd;
      sum += to_float(dy[i]) * (to_float(weight[i]) + offset) * n;
      if (partial != nullptr) {
        const float added = to_float(dy[i]) * (args.shape.cast_first ? rounded<T>(n) : n);
        partial[i] = first ? added : partial[i] + added;
      }
    }
    const float mean = sum_block(sum, warp_sums[turn]) * inverse_width;
    turn ^= 1;
    for (int64_t i = threadIdx.x; i < width; i += blockDim.x) {
      const float g = to_float(dy[i]) * (to_float(weight[i]) + offset);
      const float from_elsewhere = args.dh != nullptr ? to_float(dh[i]) : 0.0f;
      dx[i] = from_float<T>(rstd * (g - to_float(h[i]) * rstd * mean) + from_elsewhere);
    }
  }
}

constexpr int kSumColumns = 32;
constexpr int kSumSlices = 16;

// dweight[i] = the sum of column i of the partials. Warps take every sixteenth row, then their sums are added in order.
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

// --- launchers -------------------------------------------------------------------------------------------------------

// Calls body with a value of the element type and one of the weight's.
template <typename Body>
void dispatch_both(const RmsNormShape& shape, const Body& body) {
  dispatch("rms_norm", shape.dtype, [&](auto zero) {
    if (shape.weight_dtype == shape.dtype) {
      body(zero, zero);
    } else {
      body(zero, float{});
    }
  });
}

template <typename T>
bool rows_aligned(const void* rows, int64_t stride) {
  return is_aligned(rows) && stride % kEach<T> == 0;
}

std::string describe(const char* what, const RmsNormShape& shape) {
  return concat(what, " of ", shape.rows, " rows of ", shape.width);
}

Grid grid_of(int64_t blocks, int threads) {
  return {.blocks = static_cast<unsigned>(std::min<int64_t>(blocks, INT32_MAX)),
          .threads = static_cast<unsigned>(threads),
          .overlap_launch = device_limits().wgmma};
}

template <typename T, typename W>
void launch_backward(const RmsNormBackwardArgs& args, const RmsNormConfig& config, const Context& context) {
  const float inverse_width = static_cast<float>(1.0 / static_cast<double>(args.shape.width));
  const float offset = static_cast<float>(args.shape.offset);
  const auto what = [&] { return describe("rms_norm_backward", args.shape); };
  const bool with_dweight = args.dweight != nullptr;
  Grid grid = grid_of(with_dweight ? args.partial_rows : ceil_div(args.shape.rows, config.rows), config.threads);
  if (!config.in_registers) {
    launch(what, general_backward_kernel<T, W>, grid, context, args, inverse_width, offset);
  } else {
    const int lanes_log2 = config.wide ? 0 : log2_of(config.lanes);
    if (with_dweight) {
      grid.smem_bytes = config.threads * (config.wide ? kPacks<true> : kPacks<false>)*kEach<T> * sizeof(float);
    }
    const auto kernel = config.wide
                            ? (with_dweight ? backward_kernel<T, W, true, true> : backward_kernel<T, W, true, false>)
                            : (with_dweight ? backward_kernel<T, W, false, true> : backward_kernel<T, W, false, false>);
    launch(what, kernel, grid, context, args, lanes_log2, inverse_width, offset);
  }
  if (with_dweight) {
    launch(what, sum_partials_kernel<W>, grid_of(ceil_div(args.shape.width, kSumColumns), kSumColumns * kSumSlices),
           context, static_cast<const float*>(args.partials), args.partial_rows, args.shape.width,
           static_cast<W*>(args.dweight));
  }
}

}  // namespace

void rms_norm(const RmsNormArgs& args, const Context& context) {
  check_rms_norm(args.shape);
  dispatch_both(args.shape, [&](auto zero, auto weight_zero) {
    using T = decltype(zero);
    using W = decltype(weight_zero);
    const bool aligned = rows_aligned<T>(args.x, args.x_stride) &&
                         rows_aligned<T>(args.residual, args.residual_stride) && is_aligned(args.weight) &&
                         is_aligned(args.y) && is_aligned(args.h);
    const RmsNormConfig config = rms_norm_config(args.shape.width, sizeof(T), aligned);
    const float inverse_width = static_cast<float>(1.0 / static_cast<double>(args.shape.width));
    const float eps = static_cast<float>(args.eps), offset = static_cast<float>(args.shape.offset);
    const auto what = [&] { return describe("rms_norm", args.shape); };
    const Grid grid = grid_of(ceil_div(args.shape.rows, config.rows), config.threads);
    if (!config.in_registers) {
      launch(what, general_forward_kernel<T, W>, grid, context, args, inverse_width, eps, offset);
    } else {
      const bool with_residual = args.residual != nullptr;
      const auto kernel =
          config.wide ? (with_residual ? forward_kernel<T, W, true, true> : forward_kernel<T, W, true, false>)
                      : (with_residual ? forward_kernel<T, W, false, true> : forward_kernel<T, W, false, false>);
      const int lanes_log2 = config.wide ? 0 : log2_of(config.lanes);
      launch(what, kernel, grid, context, args, lanes_log2, inverse_width, eps, offset);
    }
  });
}

void rms_norm_backward(const RmsNormBackwardArgs& args, const Context& context) {
  check_rms_norm(args.shape);
  dispatch_both(args.shape, [&](auto zero, auto weight_zero) {
    using T = decltype(zero);
    using W = decltype(weight_zero);
    const bool aligned = rows_aligned<T>(args.dy, args.dy_stride) && rows_aligned<T>(args.h, args.h_stride) &&
                         rows_aligned<T>(args.dh, args.dh_stride) && is_aligned(args.weight) && is_aligned(args.dx) &&
                         (args.dweight == nullptr || is_aligned(args.partials));
    launch_backward<T, W>(args, rms_norm_config(args.shape.width, sizeof(T), aligned), context);
  });
}

}  // namespace fastpeft::cuda
