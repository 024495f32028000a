// The norm of all gradients on CUDA, and what the next steps do with them, without a word to the host.
//
// Plan     Gradients travel in the kernel's parameters, up to 1600 a launch. Thread blocks go over chunks of 4096
//          elements in fixed turns and leave one sum each; the last to finish adds these up in double, in order, so
//          that equal gradients give equal bits on every device. The last block of the last launch fills the control.
#include "common/adamw_math.h"
#include "common/adamw_table.h"
#include "common/integer.h"
#include "cuda/device/launch.cuh"
#include "cuda/device/numbers.cuh"
#include "fastpeft/adamw.h"

namespace fastpeft::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kEach = kAdamWChunk / kThreads;
constexpr int kFew = 200, kMany = 1600;  // gradients a launch

template <int kMost>
struct Gradients {
  AdamWGradient list[kMost];
  uint32_t first_chunks[kMost];
  int count;
  uint32_t chunks;
  AdamWControl* control;
  float* sums;
  double max_norm;
  const float *grad_scale, *found_inf;
  bool first, last;  // launch of the call
};
static_assert(sizeof(Gradients<kMany>) <= 32764, "kernel parameters are limited to 32764 bytes");

// --- kernel ----------------------------------------------------------------------------------------------------------

// Sum over a thread block, in thread 0; `partial` has a word for each warp.
template <typename T>
__device__ T block_sum(T value, T* partial) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_down_sync(~0u, value, distance);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = value;
  __syncthreads();
  value = threadIdx.x < kThreads / 32 ? partial[threadIdx.x] : T{};
  if (threadIdx.x < 32) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) value += __shfl_down_sync(~0u, value, distance);
  }
  return value;
}

template <typename G, int kMost>
__device__ float squares_of_chunk(const Gradients<kMost>& all, uint32_t chunk) {
  int low = 0, high = all.count - 1;  // the last gradient whose first chunk is not behind
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (all.first_chunks[middle] <= chunk) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  const int64_t first = static_cast<int64_t>(chunk - all.first_chunks[low]) * kAdamWChunk + threadIdx.x * kEach;
  const int64_t left = all.list[low].numel - first;
  const G* from = static_cast<const G*>(all.list[low].data) + first;
  float sum = 0.0f;
  if (left >= kEach && reinterpret_cast<uintptr_t>(from) % 16 == 0) {
    const auto g = load_pack<G, kEach>(from);
#pragma unroll
    for (int i = 0; i < kEach; ++i) sum = product_plus(to_float(g.values[i]), to_float(g.values[i]), sum);
  } else {
    for (int i = 0; i < kEach && i < left; ++i) sum = product_plus(to_float(from[i]), to_float(from[i]), sum);
  }
  return sum;
}

template <typename G, int kMost>
__global__ void __launch_bounds__(kThreads) norm_kernel(const __grid_constant__ Gradients<kMost> all) {
  __shared__ float partial[kThreads / 32];
  __shared__ double partial_of_sums[kThreads / 32];
  __shared__ bool is_last;
  float sum = 0.0f;
  for (uint32_t chunk = blockIdx.x; chunk < all.chunks; chunk += gridDim.x) sum += squares_of_chunk<G>(all, chunk);
  sum = block_sum(sum, partial);
  if (threadIdx.x == 0) {
    all.sums[blockIdx.x] = sum;
    __threadfence();
    is_last = atomicAdd(&all.control->ticket, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (!is_last) return;
  __threadfence();
  double total = 0.0;
  for (unsigned i = threadIdx.x; i < gridDim.x; i += kThreads) total += static_cast<double>(__ldcg(all.sums + i));
  total = block_sum(total, partial_of_sums);
  if (threadIdx.x != 0) return;
  AdamWControl& control = *all.control;
  control.ticket = 0;
  control.sum = all.first ? total : control.sum + total;
  if (all.last) finish_norm(control, all.max_norm, all.grad_scale, all.found_inf);
}

// --- launcher --------------------------------------------------------------------------------------------------------

struct Part {
  size_t dtype_list, begin, end;  // gradients
};

template <typename G, int kMost>
void launch_part(const AdamWNormArgs& args, const Part& part, bool first, bool last, const Context& context) {
  Gradients<kMost> all{};
  int64_t chunks = 0;
  for (size_t i = part.begin; i < part.end; ++i) {
    all.list[all.count] = args.gradients[part.dtype_list].list[i];
    all.first_chunks[all.count++] = static_cast<uint32_t>(chunks);
    chunks += ceil_div(args.gradients[part.dtype_list].list[i].numel, kAdamWChunk);
  }
  check(chunks <= INT32_MAX, "adamw_norm: gradients of more than 2^43 elements");
  all.chunks = static_cast<uint32_t>(chunks);
  all.control = args.control, all.sums = args.sums, all.max_norm = args.max_norm;
  all.grad_scale = args.grad_scale, all.found_inf = args.found_inf, all.first = first, all.last = last;
  const int64_t blocks = chunks < 1 ? 1 : chunks < kAdamWSums ? chunks : kAdamWSums;
  launch([&] { return concat("adamw_norm of ", all.count, " gradients"); }, norm_kernel<G, kMost>,
         Grid{static_cast<unsigned>(blocks), kThreads}, context, all);
}

}  // namespace

void adamw_norm(const AdamWNormArgs& args, const Context& context) {
  std::vector<Part> parts;
  for (size_t d = 0; d < args.gradients.size(); ++d) {
    const size_t count = args.gradients[d].list.size();
    for (size_t begin = 0; begin < count; begin += kMany) parts.push_back({d, begin, std::min(count, begin + kMany)});
  }
  if (parts.empty()) {  // the control is filled all the same
    return launch_part<float, kFew>(args, {0, 0, 0}, true, true, context);
  }
  for (size_t i = 0; i < parts.size(); ++i) {
    const bool first = i == 0, last = i + 1 == parts.size();
    dispatch("adamw_gradient_norm", args.gradients[parts[i].dtype_list].dtype, [&](auto zero) {
      using G = decltype(zero);
      if (parts[i].end - parts[i].begin <= kFew) {
        launch_part<G, kFew>(args, parts[i], first, last, context);
      } else {
        launch_part<G, kMany>(args, parts[i], first, last, context);
      }
    });
  }
}

}  // namespace fastpeft::cuda
