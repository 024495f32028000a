// Gated activations on CUDA, forward and backward: every tensor is read and written once.
//
// Plan     A thread owns 16 bytes of each tensor; 32 registers are enough for it, so that an SM has 2048 threads and
//          their loads under way. These carry no hint: read once or evicted first cost 2 to 3% (bench/LOG.md,
//          2026-11-26, "Block kernels: hints, shapes and what is asked for early"). Where all rows lie without gaps,
//          the whole tensor is one row. The 16-bit types take the fast exponential and division, whose error their
//          rounding hides; float32 takes the exact ones.
// Limits   Packs need widths, strides and pointers on the 16-byte grid; the same kernel with packs of one element takes
//          the rest.
#include "fastpeft/glu.h"

#include <algorithm>
#include <initializer_list>
#include <type_traits>

#include "common/glu_math.h"
#include "common/integer.h"
#include "cuda/device/launch.cuh"
#include "cuda/device/numbers.cuh"
#include "cuda/device/ptx.cuh"

namespace fastpeft::cuda {
namespace {

constexpr int kThreads = 256;

template <bool kExact>
struct DeviceMath {
  __device__ static float exp(float x) { return kExact ? expf(x) : __expf(x); }
  __device__ static float divide(float a, float b) { return kExact ? a / b : __fdividef(a, b); }
  __device__ static float erf(float x) { return erff(x); }
};

// --- kernels ---------------------------------------------------------------------------------------------------------

// The row of a block, and the first element of a thread's pack.
struct Place {
  int64_t row, column;
  bool inside;

  __device__ Place(unsigned blocks_per_row, int each, int64_t width) {
    row = blockIdx.x / blocks_per_row;
    column = (static_cast<int64_t>(blockIdx.x % blocks_per_row) * blockDim.x + threadIdx.x) * each;
    inside = column < width;
  }
};

template <typename T, int kN>
__device__ Pack<T, kN> load(const Place& place, const void* from, int64_t stride) {
  const T* here = static_cast<const T*>(from) + place.row * stride + place.column;
  if constexpr (kN == 1) {
    return {place.inside ? *here : T{}};
  } else {
    return load_pack_if<T, kN>(place.inside, here);
  }
}

template <typename T, int kN>
__device__ void store(const Place& place, void* to, int64_t stride, const Pack<T, kN>& pack) {
  T* here = static_cast<T*>(to) + place.row * stride + place.column;
  if constexpr (kN > 1) {
    store_pack_if(place.inside, here, pack);
  } else if (place.inside) {
    *here = pack.values[0];
  }
}

template <typename T, GluKind kKind, int kN>
__global__ void __launch_bounds__(kThreads)
    forward_kernel(const __grid_constant__ GluArgs args, unsigned blocks_per_row) {
  let_next_kernel_start();
  wait_for_kernel_before();
  const Place place(blocks_per_row, kN, args.shape.width);
  const auto gate = load<T, kN>(place, args.gate, args.gate_stride);
  const auto up = load<T, kN>(place, args.up, args.up_stride);
  Pack<T, kN> out;
#pragma unroll
  for (int j = 0; j < kN; ++j) {
    const auto act = activation<kKind, DeviceMath<std::is_same_v<T, float>>>(to_float(gate.values[j]));
    out.values[j] = from_float<T>(act.value * to_float(up.values[j]));
  }
  store(place, args.out, args.out_stride, out);
}

template <typename T, GluKind kKind, int kN>
__global__ void __launch_bounds__(kThreads)
    backward_kernel(const __grid_constant__ GluBackwardArgs args, unsigned blocks_per_row) {
  let_next_kernel_start();
  wait_for_kernel_before();
  const Place place(blocks_per_row, kN, args.shape.width);
  const auto gate = load<T, kN>(place, args.gate, args.gate_stride);
  const auto up = load<T, kN>(place, args.up, args.up_stride);
  const auto dy = load<T, kN>(place, args.dy, args.dy_stride);
  Pack<T, kN> dgate, dup;
#pragma unroll
  for (int j = 0; j < kN; ++j) {
    const auto act = activation<kKind, DeviceMath<std::is_same_v<T, float>>>(to_float(gate.values[j]));
    const float g = to_float(dy.values[j]);
    dgate.values[j] = from_float<T>(g * to_float(up.values[j]) * act.slope);
    dup.values[j] = from_float<T>(g * act.value);
  }
  store(place, args.dgate, args.dgate_stride, dgate);
  store(place, args.dup, args.dup_stride, dup);
}

// --- launchers -------------------------------------------------------------------------------------------------------

// One row of everything, where rows lie without gaps in all tensors.
void join_rows(GluShape& shape, std::initializer_list<int64_t> strides) {
  if (std::any_of(strides.begin(), strides.end(), [&](int64_t stride) { return stride != shape.width; })) return;
  shape.width *= shape.rows;
  shape.rows = 1;
}

bool fits_packs(const GluShape& shape, int64_t each, std::initializer_list<const void*> rows,
                std::initializer_list<int64_t> strides) {
  return shape.width % each == 0 && std::all_of(rows.begin(), rows.end(), is_aligned) &&
         (shape.rows == 1 || std::all_of(strides.begin(), strides.end(), [&](int64_t s) { return s % each == 0; }));
}

template <typename Args>
void launch_rows(const char* function, void (*kernel)(Args, unsigned), const Args& args, int64_t each,
                 const Context& context) {
  const GluShape& shape = args.shape;
  const int64_t packs = ceil_div(shape.width, each);
  const int64_t blocks_per_row = ceil_div(packs, kThreads);
  if (shape.rows * packs == 0) return;
  check(shape.rows * blocks_per_row <= INT32_MAX, function, ": ", shape.rows, " rows of ", shape.width,
        " elements are too many for one call");
  // No more threads than a row's blocks need, so that few are idle in its last one.
  const int64_t threads = ceil_div(ceil_div(packs, blocks_per_row), 32) * 32;
  launch([&] { return concat(function, " of ", shape.rows, " rows of ", shape.width); }, kernel,
         Grid{.blocks = static_cast<unsigned>(shape.rows * blocks_per_row),
              .threads = static_cast<unsigned>(threads),
              .overlap_launch = device_limits().wgmma},
         context, args, static_cast<unsigned>(blocks_per_row));
}

}  // namespace

void glu(const GluArgs& given, const Context& context) {
  GluArgs args = given;
  join_rows(args.shape, {args.gate_stride, args.up_stride, args.out_stride});
  dispatch("glu", args.shape.dtype, [&](auto zero) {
    dispatch_kind(args.shape.kind, [&](auto kind) {
      using T = decltype(zero);
      constexpr GluKind kKind = decltype(kind)::value;
      constexpr int kN = 16 / static_cast<int>(sizeof(T));
      if (fits_packs(args.shape, kN, {args.gate, args.up, args.out},
                     {args.gate_stride, args.up_stride, args.out_stride})) {
        launch_rows("glu", forward_kernel<T, kKind, kN>, args, kN, context);
      } else {
        launch_rows("glu", forward_kernel<T, kKind, 1>, args, 1, context);
      }
    });
  });
}

void glu_backward(const GluBackwardArgs& given, const Context& context) {
  GluBackwardArgs args = given;
  const std::initializer_list<int64_t> strides = {args.dy_stride, args.gate_stride, args.up_stride, args.dgate_stride,
                                                  args.dup_stride};
  join_rows(args.shape, strides);
  dispatch("glu_backward", args.shape.dtype, [&](auto zero) {
    dispatch_kind(args.shape.kind, [&](auto kind) {
      using T = decltype(zero);
      constexpr GluKind kKind = decltype(kind)::value;
      constexpr int kN = 16 / static_cast<int>(sizeof(T));
      if (fits_packs(args.shape, kN, {args.dy, args.gate, args.up, args.dgate, args.dup}, strides)) {
        launch_rows("glu_backward", backward_kernel<T, kKind, kN>, args, kN, context);
      } else {
        launch_rows("glu_backward", backward_kernel<T, kKind, 1>, args, 1, context);
      }
    });
  });
}

}  // namespace fastpeft::cuda
