// RMSNorm on CUDA, with the residual add before it and the gradients of both: every tensor is read and written once.
//
// Plan     A row lies in the registers of its threads (rms_norm_config.h), so it is read once although it is needed
//          before and after the sum over it. All loads of a row stand before the first use, and the first blocks ask
//          L2 for theirs while the kernel before still runs. Rows go through L1 and stay in L2 as long as anything
//          else: loads hinted to be read once cost 1.5 to 4% (bench/LOG.md, 2026-11-26, "Block kernels: hints, shapes
//          and what is asked for early").
// Backward rms_norm_backward_kernel.cuh.
// Limits   Rows of whole 16-byte packs on the 16-byte grid, up to 2048 packs; the general kernels take the rest.
#include "fastpeft/rms_norm.h"

#include <type_traits>

#include "common/rms_norm_checks.h"
#include "cuda/device/launch.cuh"
#include "cuda/device/numbers.cuh"
#include "cuda/device/ptx.cuh"
#include "cuda/rms_norm_backward_kernel.cuh"
#include "cuda/rms_norm_config.h"
#include "cuda/rms_norm_row.cuh"

namespace fastpeft::cuda {
namespace {

using namespace norm;

// --- kernels ---------------------------------------------------------------------------------------------------------

// Blocks of kMostThreads that an SM has room for at least: the compiler would spend more registers, and with them the
// loads under way.
template <typename T, typename W, int kP, bool kResidual>
constexpr int least_blocks() {
  if (kP == 1 && sizeof(T) == 2) return kResidual ? 4 : 5;
  return kP == 2 && !kResidual && std::is_same_v<T, W> ? 3 : 1;
}

template <typename T, typename W, int kP, bool kResidual>
__global__ void __launch_bounds__(kMostThreads<kP>, least_blocks<T, W, kP, kResidual>())
    forward_kernel(const __grid_constant__ RmsNormArgs args, int lanes_log2, unsigned early_blocks, float inverse_width,
                   float eps, float offset) {
  constexpr int kN = kEach<T>, kR = kRows<kP>;
  __shared__ float warp_sums[kMostWarps];
  let_next_kernel_start();
  const Seat<kP> seat(lanes_log2);
  const int64_t width = args.shape.width;
  const int packs = static_cast<int>(width / kN);
  const int64_t first = blockIdx.x * static_cast<int64_t>(seat.groups * kR);
  // L2 is where all SMs meet, so that nothing stale can come of rows that the kernel before has yet to write.
  if (blockIdx.x < early_blocks && threadIdx.x < (kResidual ? 2 : 1)) {
    const T* from = threadIdx.x == 0 ? static_cast<const T*>(args.x) + first * args.x_stride
                                     : static_cast<const T*>(args.residual) + first * args.residual_stride;
    const int64_t rows = min(static_cast<int64_t>(seat.groups * kR), args.shape.rows - first);
    prefetch_l2(from, static_cast<uint32_t>(rows * width * sizeof(T)));
  }
  wait_for_kernel_before();

  bool here[kR][kP];
  Pack<T, kN> x[kR][kP];
#pragma unroll
  for (int r = 0; r < kR; ++r) {
    const int64_t row = first + r * seat.groups + seat.group;
    const T* x_row = static_cast<const T*>(args.x) + row * args.x_stride;
#pragma unroll
    for (int i = 0; i < kP; ++i) {
      here[r][i] = (kWide<kP> || row < args.shape.rows) && seat.pack(i) < packs;
      x[r][i] = load_pack_if<T, kN>(here[r][i], x_row + seat.pack(i) * kN);
    }
  }
  if constexpr (kResidual) {
    Pack<T, kN> residual[kR][kP];
#pragma unroll
    for (int r = 0; r < kR; ++r) {
      const int64_t row = first + r * seat.groups + seat.group;
      const T* residual_row = static_cast<const T*>(args.residual) + row * args.residual_stride;
#pragma unroll
      for (int i = 0; i < kP; ++i) {
        residual[r][i] = load_pack_if<T, kN>(here[r][i], residual_row + seat.pack(i) * kN);
      }
    }
#pragma unroll
    for (int r = 0; r < kR; ++r) {
      T* h_row = static_cast<T*>(args.h) + (first + r * seat.groups + seat.group) * width;
#pragma unroll
      for (int i = 0; i < kP; ++i) {
#pragma unroll
        for (int j = 0; j < kN; ++j) {
          x[r][i].values[j] = from_float<T>(to_float(x[r][i].values[j]) + to_float(residual[r][i].values[j]));
        }
        store_pack_if(here[r][i], h_row + seat.pack(i) * kN, x[r][i]);
      }
    }
  }
  Pack<W, kN> w[kP];
#pragma unroll
  for (int i = 0; i < kP; ++i) {
    w[i] = load_pack_if<W, kN>(seat.pack(i) < packs, static_cast<const W*>(args.weight) + seat.pack(i) * kN);
  }
#pragma unroll
  for (int r = 0; r < kR; ++r) {
    const int64_t row = first + r * seat.groups + seat.group;
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kP; ++i) {
#pragma unroll
      for (int j = 0; j < kN; ++j) sum += to_float(x[r][i].values[j]) * to_float(x[r][i].values[j]);
    }
    const float rstd = rsqrtf(sum_row<kP>(sum, seat.lanes, warp_sums) * inverse_width + eps);
    if (seat.lane == 0 && here[r][0]) static_cast<float*>(args.rstd)[row] = rstd;
    T* y_row = static_cast<T*>(args.y) + row * width;
#pragma unroll
    for (int i = 0; i < kP; ++i) keep_packed(x[r][i]);
#pragma unroll
    for (int i = 0; i < kP; ++i) {
      Pack<T, kN> y;
#pragma unroll
      for (int j = 0; j < kN; ++j) {
        float n = to_float(x[r][i].values[j]) * rstd;
        if (args.shape.cast_first) n = rounded<T>(n);
        y.values[j] = from_float<T>(n * (to_float(w[i].values[j]) + offset));
      }
      store_pack_if(here[r][i], y_row + seat.pack(i) * kN, y);
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

using BackwardKernel = void (*)(RmsNormBackwardArgs, int, float, float);

template <typename T, typename W, int kP>
BackwardKernel backward_kernel_of(bool with_dh, bool with_dweight) {
  if (with_dweight) return with_dh ? dweight_kernel<T, W, kP, true> : dweight_kernel<T, W, kP, false>;
  return with_dh ? backward_kernel<T, W, kP, true> : backward_kernel<T, W, kP, false>;
}

// Calls body with a constant, the packs of a row that a thread has.
template <typename Body>
void dispatch_packs(const RmsNormConfig& config, const Body& body) {
  switch (config.packs) {
    case 1: return body(std::integral_constant<int, 1>{});
    case 2: return body(std::integral_constant<int, 2>{});
    default: return body(std::integral_constant<int, kRmsNormMostPacks>{});
  }
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
    dispatch_packs(config, [&](auto packs) {
      if (with_dweight) grid.smem_bytes = config.threads * kSharedSums<kEach<T>, packs.value> * sizeof(float);
      launch(what, backward_kernel_of<T, W, packs.value>(args.dh != nullptr, with_dweight), grid, context, args,
             log2_of(config.lanes), inverse_width, offset);
    });
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
      // Those that fit on the device at once, or somewhat more: they start while the kernel before still runs. A fetch
      // needs rows without gaps.
      const bool gaps =
          args.x_stride != args.shape.width || (with_residual && args.residual_stride != args.shape.width);
      const DeviceLimits limits = device_limits();
      const unsigned early_blocks =
          gaps || !limits.wgmma ? 0 : static_cast<unsigned>(limits.sms * (2048 / config.threads));
      dispatch_packs(config, [&](auto packs) {
        launch(what, with_residual ? forward_kernel<T, W, packs.value, true> : forward_kernel<T, W, packs.value, false>,
               grid, context, args, log2_of(config.lanes), early_blocks, inverse_width, eps, offset);
      });
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
