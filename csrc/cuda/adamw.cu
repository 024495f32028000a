// AdamW on CUDA: one launch for a whole list of tensors.
//
// Plan     The list travels in the kernel's parameters (up to 32 KB of them since CUDA 12.1), so nothing is uploaded
// and
//          a captured graph needs no buffer. A thread block finds its tensor by bisection over the tensors' first
//          chunks and updates one chunk of 4096 elements, eight a thread, in 16-byte accesses.
// Limits   700 tensors a launch; longer lists take several. Tensors off the 16-byte grid go element by element.
#include "fastpeft/adamw.h"

#include <algorithm>

#include "common/adamw_math.h"
#include "common/integer.h"
#include "cuda/device/launch.cuh"
#include "cuda/device/numbers.cuh"

namespace fastpeft::cuda {
namespace {

constexpr int kEach = 8;
constexpr int kThreads = 512;
constexpr int64_t kChunk = kThreads * kEach;
constexpr int kMostTensors = 700;

struct TensorList {
  AdamWTensor tensors[kMostTensors];
  unsigned first_chunk[kMostTensors];
  int count;
};
static_assert(sizeof(TensorList) + sizeof(AdamWFactors) <= 32764, "kernel parameters are limited to 32764 bytes");

// --- kernel ----------------------------------------------------------------------------------------------------------

template <typename P, typename G>
__global__ void __launch_bounds__(kThreads)
    adamw_kernel(const __grid_constant__ TensorList list, const __grid_constant__ AdamWFactors factors) {
  int low = 0, high = list.count - 1;  // the last tensor whose first chunk is not behind this block
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (list.first_chunk[middle] <= blockIdx.x) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  const AdamWTensor& tensor = list.tensors[low];
  const int64_t first =
      static_cast<int64_t>(blockIdx.x - list.first_chunk[low]) * kChunk + static_cast<int64_t>(threadIdx.x) * kEach;
  if (first >= tensor.numel) return;
  P* param = static_cast<P*>(tensor.param) + first;
  const G* grad = static_cast<const G*>(tensor.grad) + first;
  float* exp_avg = tensor.exp_avg + first;
  float* exp_avg_sq = tensor.exp_avg_sq + first;

  const uintptr_t bits = reinterpret_cast<uintptr_t>(param) | reinterpret_cast<uintptr_t>(grad) |
                         reinterpret_cast<uintptr_t>(exp_avg) | reinterpret_cast<uintptr_t>(exp_avg_sq);
  if (first + kEach <= tensor.numel && bits % 16 == 0) {
    auto p = load_pack<P, kEach>(param);
    const auto g = load_pack<G, kEach>(grad);
    auto m = load_pack<float, kEach>(exp_avg);
    auto v = load_pack<float, kEach>(exp_avg_sq);
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      p.values[i] =
          from_float<P>(adamw_update(to_float(p.values[i]), to_float(g.values[i]), m.values[i], v.values[i], factors));
    }
    store_pack(param, p);
    store_pack(exp_avg, m);
    store_pack(exp_avg_sq, v);
  } else {
    for (int i = 0; i < kEach && first + i < tensor.numel; ++i) {
      param[i] = from_float<P>(adamw_update(to_float(param[i]), to_float(grad[i]), exp_avg[i], exp_avg_sq[i], factors));
    }
  }
}

// --- launcher --------------------------------------------------------------------------------------------------------

template <typename P, typename G>
void launch_all(const AdamWArgs& args, const AdamWFactors& factors, const Context& context) {
  TensorList list{};
  int64_t chunks = 0;
  const auto flush = [&] {
    if (list.count > 0) {
      launch([&] { return concat("adamw over ", list.count, " tensors"); }, adamw_kernel<P, G>,
             Grid{static_cast<unsigned>(chunks), kThreads}, context, list, factors);
    }
    list.count = 0;
    chunks = 0;
  };
  for (const AdamWTensor& tensor : args.tensors) {
    if (tensor.numel == 0) continue;
    if (list.count == kMostTensors || chunks + ceil_div(tensor.numel, kChunk) > INT32_MAX) flush();
    list.tensors[list.count] = tensor;
    list.first_chunk[list.count++] = static_cast<unsigned>(chunks);
    chunks += ceil_div(tensor.numel, kChunk);
  }
  flush();
}

}  // namespace

void adamw(const AdamWArgs& args, const Context& context) {
  const AdamWFactors factors = adamw_factors(args);
  dispatch("adamw", args.param_dtype, [&](auto param_zero) {
    dispatch("adamw", args.grad_dtype,
             [&](auto grad_zero) { launch_all<decltype(param_zero), decltype(grad_zero)>(args, factors, context); });
  });
}

}  // namespace fastpeft::cuda
