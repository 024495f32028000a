// Counter-based dropout on CUDA: a thread draws four numbers twice and owns eight elements.
#include "fastpeft/dropout.h"

#include "common/dropout_mask.h"
#include "cuda/device/launch.cuh"
#include "cuda/device/numbers.cuh"

namespace fastpeft::cuda {
namespace {

constexpr int kEach = 8;
constexpr int kThreads = 256;

template <typename T>
__global__ void __launch_bounds__(kThreads)
    dropout_kernel(const T* x, T* out, int64_t numel, uint64_t threshold, float scale, uint64_t seed, bool aligned) {
  const int64_t first = (blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x) * kEach;
  if (first >= numel) return;
  const bool whole = aligned && first + kEach <= numel;
  Pack<T, kEach> pack;
  if (whole) {
    pack = load_pack<T, kEach>(x + first);
  } else {
#pragma unroll
    for (int i = 0; i < kEach; ++i) pack.values[i] = from_float<T>(first + i < numel ? to_float(x[first + i]) : 0.0f);
  }
#pragma unroll
  for (int quad = 0; quad < kEach / 4; ++quad) {
    const Philox4 random = philox(static_cast<uint64_t>(first) / 4 + quad, seed);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      T& value = pack.values[4 * quad + i];
      value = from_float<T>(random.words[i] >= threshold ? to_float(value) * scale : 0.0f);
    }
  }
  if (whole) {
    store_pack(out + first, pack);
  } else {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      if (first + i < numel) out[first + i] = pack.values[i];
    }
  }
}

}  // namespace

void dropout(const DropoutArgs& args, const Context& context) {
  check_dropout(args);
  dispatch("dropout", args.dtype, [&](auto zero) {
    using T = decltype(zero);
    launch([&] { return concat("dropout of ", args.numel, " elements"); }, dropout_kernel<T>,
           cover(args.numel, kThreads * kEach, kThreads), context, static_cast<const T*>(args.x),
           static_cast<T*>(args.out), args.numel, dropout_threshold(args.p), static_cast<float>(1.0 / (1.0 - args.p)),
           args.seed, is_aligned(args.x) && is_aligned(args.out));
  });
}

}  // namespace fastpeft::cuda
