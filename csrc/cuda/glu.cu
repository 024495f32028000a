// Gated activations on CUDA, forward and backward: every tensor is read and written once.
//
// Plan     A thread owns two packs of 16 bytes of a row, loaded before either is used. Where all rows lie without gaps,
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

constexpr int kPacks = 2;  // of a thread
constexpr int kMostThreads = 256;
// Resident blocks that the registers must allow: told so, the compiler puts all loads first.
constexpr int kForwardBlocks = 4, kBackwardBlocks = 3;

template <bool kExact>
struct DeviceMath {
  __device__ static float sigmoid(float x) {
    return kExact ? 1.0f / (1.0f + expf(-x)) : __fdividef(1.0f, 1.0f + __expf(-x));
  }
  __device__ static float exp(float x) { return kExact ? expf(x) : __expf(x); }
  __device__ static float erf(float x) { return erff(x); }
};

// --- kernels ---------------------------------------------------------------------------------------------------------

// The row of a block, and the first elements of its threads' packs.
template <int kN>
struct Place {
  int64_t row, columns[kPacks];

  __device__ explicit Place(unsigned blocks_per_row) {
    row = blockIdx.x / blocks_per_row;
    const int64_t block_column = static_cast<int64_t>(blockIdx.x % blocks_per_row) * kPacks * blockDim.x;
#pragma unroll
    for (int i = 0; i < kPacks; ++i) columns[i] = (block_column + i * blockDim.x + threadIdx.x) * kN;
  }
};

template <typename T, int kN>
__device__ void load_row(Pack<T, kN> (&packs)[kPacks], const Place<kN>& place, const void* from, int64_t stride,
                         int64_t width) {
  const T* row = static_cast<const T*>(from) + place.row * stride;
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    if constexpr (kN == 1) {
      packs[i].values[0] = place.columns[i] < width ? row[place.columns[i]] : T{};
    } else {
      packs[i] = load_pack_once_if<T, kN>(place.columns[i] < width, row + place.columns[i]);
    }
  }
}

template <typename T, int kN>
__device__ void store_row(const Pack<T, kN> (&packs)[kPacks], const Place<kN>& place, void* to, int64_t stride,
                          int64_t width) {
  T* row = static_cast<T*>(to) + place.row * stride;
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    if constexpr (kN == 1) {
      if (place.columns[i] < width) row[place.columns[i]] = packs[i].values[0];
    } else {
      store_pack_if(place.columns[i] < width, row + place.columns[i], packs[i]);
    }
  }
}

template <typename T, GluKind kKind, int kN>
__global__ void __launch_bounds__(kMostThreads, kForwardBlocks)
    forward_kernel(const __grid_constant__ GluArgs args, unsigned blocks_per_row) {
  let_next_kernel_start();
  wait_for_kernel_before();
  const Place<kN> place(blocks_per_row);
  const int64_t width = args.shape.width;
  Pack<T, kN> gate[kPacks], up[kPacks];
  load_row<T, kN>(gate, place, args.gate, args.gate_stride, width);
  load_row<T, kN>(up, place, args.up, args.up_stride, width);
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
#pragma unroll
    for (int j = 0; j < kN; ++j) {
      const auto act = activation<kKind, DeviceMath<std::is_same_v<T, float>>>(to_float(gate[i].values[j]));
      up[i].values[j] = from_float<T>(act.value * to_float(up[i].values[j]));
    }
  }
  store_row<T, kN>(up, place, args.out, args.out_stride, width);
}

template <typename T, GluKind kKind, int kN>
__global__ void __launch_bounds__(kMostThreads, kBackwardBlocks)
    backward_kernel(const __grid_constant__ GluBackwardArgs args, unsigned blocks_per_row) {
  let_next_kernel_start();
  wait_for_kernel_before();
  const Place<kN> place(blocks_per_row);
  const int64_t width = args.shape.width;
  Pack<T, kN> gate[kPacks], up[kPacks], dy[kPacks];
  load_row<T, kN>(gate, place, args.gate, args.gate_stride, width);
  load_row<T, kN>(up, place, args.up, args.up_stride, width);
  load_row<T, kN>(dy, place, args.dy, args.dy_stride, width);
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
#pragma unroll
    for (int j = 0; j < kN; ++j) {
      const auto act = activation<kKind, DeviceMath<std::is_same_v<T, float>>>(to_float(gate[i].values[j]));
      const float g = to_float(dy[i].values[j]);
      gate[i].values[j] = from_float<T>(g * to_float(up[i].values[j]) * act.slope);
      up[i].values[j] = from_float<T>(g * act.value);
    }
  }
  store_row<T, kN>(gate, place, args.dgate, args.dgate_stride, width);
  store_row<T, kN>(up, place, args.dup, args.dup_stride, width);
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
  const int64_t blocks_per_row = ceil_div(packs, int64_t{kPacks} * kMostThreads);
  check(shape.rows * blocks_per_row <= INT32_MAX, function, ": ", shape.rows, " rows of ", shape.width,
        " elements are too many for one call");
  if (shape.rows * packs == 0) return;
  // No more threads than a row's blocks need, so that few are idle in its last one.
  const int64_t threads = ceil_div(ceil_div(packs, blocks_per_row * kPacks), 32) * 32;
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
