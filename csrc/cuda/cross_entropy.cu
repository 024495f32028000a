// Cross-entropy of rows of logits on CUDA, forward with the gradient, or the gradient from a known log-sum-exp.
//
// Layout   logits [rows, stride], rows on the 16-byte grid; a vector is 16 bytes; the last one of a row may reach past
//          column v, into memory that is the row's own.
// Plan     cross_entropy needs two looks at a row: one for the greatest logit and the sum, one for the gradient.
//          Held rows (Hopper): a cluster of 1 to 8 blocks takes a row, each with at most kPartBytes of it in shared
//          memory, brought by one bulk copy; the blocks exchange their sums there. So the logits leave and enter global
//          memory once. Three blocks of a multiprocessor are in different phases, which keeps the memory busy.
//          Other rows: one block a row, which reads it twice; a block a multiprocessor leaves the second look to L2.
// Sums     a thread keeps the greatest logit so far and its sum relative to it; all combine in a fixed order.
// Source   online softmax: Milakov and Gimelshein, arXiv 1805.02867.
#include "fastpeft/cross_entropy.h"

#include <algorithm>
#include <cfloat>
#include <type_traits>

#include "common/cross_entropy_math.h"
#include "common/integer.h"
#include "cuda/device/hopper.cuh"
#include "cuda/device/launch.cuh"
#include "cuda/device/numbers.cuh"
#include "cuda/device/ptx.cuh"

namespace fastpeft::cuda {
namespace {

constexpr int kHeldThreads = 256, kThreads = 1024;
constexpr int kBatch = 4;                  // vectors a thread loads before it uses the first
constexpr int kMostBlocks = 8;             // of a cluster, on every Hopper
constexpr int kPartBytes = 75 << 10;       // of a row in one block: three blocks fit a multiprocessor
constexpr int kLeastHeldBytes = 16 << 10;  // shorter rows are not worth a bulk copy
constexpr float kLog2E = 1.44269504088896f;

template <typename T>
constexpr int kEach = 16 / sizeof(T);

struct Problem {
  void* logits;
  int64_t stride;
  const int64_t* target;
  int64_t ignore_index;
  int v;
  LossFactors<float> factors;
};

struct Outputs {
  float* loss;
  float* lse;
  float* entropy;
  const float* divisor;
  bool gradient;
};

// --- one logit -------------------------------------------------------------------------------------------------------

// For 16-bit logits, whose own rounding is far larger, the instruction; for float32 the library's.
template <typename T>
__device__ inline float exp_of(float x) {
  if constexpr (sizeof(T) == 4) {
    return expf(x);
  } else {
    return exp2_approx_ftz(x * kLog2E);
  }
}

// tanh and its slope; the tanh instruction is good for 11 bits only.
template <typename T>
__device__ inline float tanh_of(float y, float& slope) {
  if constexpr (sizeof(T) == 4) {
    const float t = tanhf(y);
    slope = 1.0f - t * t;
    return t;
  } else {
    const float r = rcp_approx_ftz(1.0f + exp_of<T>(2.0f * y));
    slope = 4.0f * r * (1.0f - r);
    return 1.0f - 2.0f * r;
  }
}

// z of x, and dz/dx.
template <bool kCap, typename T>
__device__ inline float scaled(T logit, const LossFactors<float>& f, float& slope) {
  const float x = to_float(logit);
  slope = f.scale;
  if constexpr (!kCap) return f.scale * x;
  float of_tanh;
  const float z = f.scale * (f.cap * tanh_of<T>(x * f.inverse_cap, of_tanh));
  slope *= of_tanh;
  return z;
}

// --- sums ------------------------------------------------------------------------------------------------------------

// Of some columns. `sum` and `weighted` count from exp(max); max is finite, so that -inf logits count as nothing.
struct alignas(16) Sums {
  float max = -FLT_MAX;
  float sum = 0.0f;       // exp(z - max)
  float plain = 0.0f;     // z
  float weighted = 0.0f;  // exp(z - max) * z
};

template <bool kAll, bool kCap, typename T>
__device__ inline void add(Sums& s, const Pack<T, kEach<T>>& pack, int count, const LossFactors<float>& f) {
  float z[kEach<T>];
  float max = -FLT_MAX;
#pragma unroll
  for (int i = 0; i < kEach<T>; ++i) {
    float slope;
    z[i] = i < count ? scaled<kCap>(pack.values[i], f, slope) : -INFINITY;
    max = fmaxf(max, z[i]);
  }
  if (max > s.max) {
    const float shrink = exp_of<T>(s.max - max);
    s.sum *= shrink;
    if constexpr (kAll) s.weighted *= shrink;
    s.max = max;
  }
#pragma unroll
  for (int i = 0; i < kEach<T>; ++i) {
    const float e = exp_of<T>(z[i] - s.max);
    s.sum += e;
    if constexpr (kAll) {
      if (i < count) s.plain += z[i];
      s.weighted += e == 0.0f ? 0.0f : e * z[i];  // -inf weighs nothing
    }
  }
}

// Rounded alike whichever of the two comes first, so that every thread that merges the same sums gets the same bits.
template <bool kAll>
__device__ inline void merge(Sums& s, const Sums& other) {
  const float max = fmaxf(s.max, other.max);
  const float shrink = expf(s.max - max), shrink_other = expf(other.max - max);
  s.sum = __fadd_rn(__fmul_rn(s.sum, shrink), __fmul_rn(other.sum, shrink_other));
  if constexpr (kAll) {
    s.plain += other.plain;
    s.weighted = __fadd_rn(__fmul_rn(s.weighted, shrink), __fmul_rn(other.weighted, shrink_other));
  }
  s.max = max;
}

template <bool kAll>
__device__ inline void merge_warp(Sums& s) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    Sums other;
    other.max = __shfl_xor_sync(~0u, s.max, distance);
    other.sum = __shfl_xor_sync(~0u, s.sum, distance);
    if constexpr (kAll) {
      other.plain = __shfl_xor_sync(~0u, s.plain, distance);
      other.weighted = __shfl_xor_sync(~0u, s.weighted, distance);
    }
    merge<kAll>(s, other);
  }
}

// --- a run of vectors ------------------------------------------------------------------------------------------------

// Calls body(vector, pack) for this thread's vectors of [0, count); loads go ahead of their use.
template <int kBlock, typename T, typename Body>
__device__ inline void each_vector(const T* from, int count, const Body& body) {
  for (int first = threadIdx.x; first < count; first += kBatch * kBlock) {
    Pack<T, kEach<T>> packs[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (first + i * kBlock < count) packs[i] = load_pack<T, kEach<T>>(from + (first + i * kBlock) * kEach<T>);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (first + i * kBlock < count) body(first + i * kBlock, packs[i]);
    }
  }
}

template <bool kAll, bool kCap, int kBlock, typename T>
__device__ inline void add_vectors(Sums& s, const T* from, int count, int columns, const LossFactors<float>& f) {
  each_vector<kBlock>(from, count, [&](int vector, const Pack<T, kEach<T>>& pack) {
    const int left = columns - vector * kEach<T>;
    if (left >= kEach<T>) {
      add<kAll, kCap, T>(s, pack, kEach<T>, f);
    } else {
      add<kAll, kCap, T>(s, pack, left, f);
    }
  });
}

// Writes row_scale * dloss/dx, with p_j = exp(z_j - shift) * norm: a rounded lse as the shift would put its error into
// every p_j. `target` counts from the first of these columns and may lie outside them.
template <bool kCap, int kBlock, typename T>
__device__ inline void write_gradient(const T* from, T* to, int count, int target, float shift, float norm,
                                      float row_scale, const LossFactors<float>& f) {
  each_vector<kBlock>(from, count, [&](int vector, const Pack<T, kEach<T>>& pack) {
    const int here = target - vector * kEach<T>;
    Pack<T, kEach<T>> out;
#pragma unroll
    for (int i = 0; i < kEach<T>; ++i) {
      float slope;
      const float z = scaled<kCap>(pack.values[i], f, slope);
      float d = exp_of<T>(z - shift) * norm - f.everywhere;
      if (i == here) d -= f.on_target;
      out.values[i] = from_float<T>(d * (slope * row_scale));
    }
    store_pack(to + vector * kEach<T>, out);
  });
}

template <int kBlock, typename T>
__device__ inline void write_zeros(T* to, int count) {
  for (int vector = threadIdx.x; vector < count; vector += kBlock) {
    reinterpret_cast<uint4*>(to)[vector] = make_uint4(0, 0, 0, 0);
  }
}

// Calls body with true or false as a type: whether there is a cap is asked once a row, not once a logit.
template <typename Body>
__device__ inline void by_cap(const LossFactors<float>& f, const Body& body) {
  if (f.cap > 0.0f) {
    body(std::true_type{});
  } else {
    body(std::false_type{});
  }
}

// --- kernels ---------------------------------------------------------------------------------------------------------

template <typename T, bool kAll, bool kHeld>
__device__ inline void loss_row(const Problem& p, const Outputs& out, int cluster, int part_vectors) {
  constexpr int kBlock = kHeld ? kHeldThreads : kThreads;
  constexpr int kWarps = kBlock / 32;
  extern __shared__ __align__(128) unsigned char held[];
  __shared__ Sums of_warps[kWarps], of_blocks[kMostBlocks];
  __shared__ __align__(8) uint64_t arrived;

  const int rank = kHeld ? static_cast<int>(cluster_rank()) : 0;
  const int64_t row = kHeld ? blockIdx.x / cluster : blockIdx.x;
  const int begin = rank * part_vectors;
  const int count = max(0, min(part_vectors, (p.v + kEach<T> - 1) / kEach<T> - begin));
  T* x = static_cast<T*>(p.logits) + row * p.stride;
  T* part = x + begin * kEach<T>;
  const bool speaks = rank == 0 && threadIdx.x == 0;

  const int64_t target = p.target[row];
  if (target == p.ignore_index) {  // so in every block of the cluster
    if (out.gradient) write_zeros<kBlock>(part, count);
    if (speaks) {
      out.loss[row] = 0.0f, out.lse[row] = 0.0f;
      if (out.entropy != nullptr) out.entropy[row] = 0.0f;
    }
    return;
  }
  const T* from = part;
  if constexpr (kHeld) {
    if (threadIdx.x == 0) {
      barrier_init(shared_offset(&arrived), 1);
      barrier_init_fence();
      fence_async_shared();
      barrier_arrive_expect(shared_offset(&arrived), count * 16);
      if (count > 0) bulk_load(shared_offset(held), part, count * 16, shared_offset(&arrived));
    }
    __syncthreads();
    if (cluster > 1) cluster_arrive();  // this block has started
    from = reinterpret_cast<const T*>(held);
  }
  // Read before any block overwrites it: all do so behind the exchange of sums.
  const bool valid = target >= 0 && target < p.v;
  float at_target = NAN;
  if (speaks && valid) {
    float slope;
    by_cap(p.factors, [&](auto cap) { at_target = scaled<cap.value>(x[target], p.factors, slope); });
  }
  if constexpr (kHeld) barrier_wait(shared_offset(&arrived), 0);

  Sums s;
  by_cap(p.factors,
         [&](auto cap) { add_vectors<kAll, cap.value, kBlock>(s, from, count, p.v - begin * kEach<T>, p.factors); });
  merge_warp<kAll>(s);
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = s;
  __syncthreads();
  Sums whole;
  if (threadIdx.x % 32 < kWarps) whole = of_warps[threadIdx.x % 32];
  merge_warp<kAll>(whole);
  if constexpr (kHeld) {
    if (cluster > 1) {
      cluster_wait();  // all have started: their shared memory can be written
      if (threadIdx.x < cluster) store_remote(shared_of(threadIdx.x, shared_offset(&of_blocks[rank])), whole);
      __syncwarp();
      cluster_arrive();
      cluster_wait();
      whole = of_blocks[0];
      for (int block = 1; block < cluster; ++block) merge<kAll>(whole, of_blocks[block]);
    }
  }

  const float lse = whole.max + logf(whole.sum);
  if (speaks) {
    const LossFactors<float>& f = p.factors;
    float loss = lse - f.on_target * at_target;
    if (kAll && f.everywhere > 0.0f) loss -= f.everywhere * whole.plain;
    out.loss[row] = loss, out.lse[row] = lse;
    if (kAll && out.entropy != nullptr) out.entropy[row] = lse - whole.weighted / whole.sum;
  }
  if (out.gradient) {
    const float row_scale = valid ? reciprocal_or_zero(out.divisor) : NAN;
    const int in_part = valid ? static_cast<int>(target) - begin * kEach<T> : -1;
    by_cap(p.factors, [&](auto cap) {
      write_gradient<cap.value, kBlock>(from, part, count, in_part, whole.max, 1.0f / whole.sum, row_scale, p.factors);
    });
  }
}

template <typename T, bool kAll>
__global__ void __launch_bounds__(kThreads, 1)
    loss_kernel(const __grid_constant__ Problem p, const __grid_constant__ Outputs out, int vectors) {
  loss_row<T, kAll, false>(p, out, 1, vectors);
}

template <typename T, bool kAll>
__global__ void __launch_bounds__(kHeldThreads, 3)
    held_loss_kernel(const __grid_constant__ Problem p, const __grid_constant__ Outputs out, int cluster,
                     int part_vectors) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  loss_row<T, kAll, true>(p, out, cluster, part_vectors);
#endif
}

template <typename T>
__global__ void __launch_bounds__(kHeldThreads) gradient_kernel(const __grid_constant__ Problem p, const float* lse,
                                                                const float* grad, int part_vectors, int parts) {
  const int64_t row = blockIdx.x / parts;
  const int begin = blockIdx.x % parts * part_vectors;
  const int count = min(part_vectors, (p.v + kEach<T> - 1) / kEach<T> - begin);
  T* part = static_cast<T*>(p.logits) + row * p.stride + begin * kEach<T>;
  const int64_t target = p.target[row];
  if (target == p.ignore_index) {
    write_zeros<kHeldThreads>(part, count);
    return;
  }
  const bool valid = target >= 0 && target < p.v;
  const int in_part = valid ? static_cast<int>(target) - begin * kEach<T> : -1;
  by_cap(p.factors, [&](auto cap) {
    write_gradient<cap.value, kHeldThreads>(part, part, count, in_part, lse[row], 1.0f, valid ? grad[row] : NAN,
                                            p.factors);
  });
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    scale_kernel(T* x, int64_t numel, const float* factor, const float* divisor, bool aligned) {
  const float by = *factor * reciprocal_or_zero(divisor);
  if (by == 1.0f) return;
  const int64_t vectors = aligned ? numel / kEach<T> : 0;
  const int64_t me = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  const int64_t all = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t vector = me; vector < vectors; vector += all) {
    auto pack = load_pack<T, kEach<T>>(x + vector * kEach<T>);
#pragma unroll
    for (int i = 0; i < kEach<T>; ++i) pack.values[i] = from_float<T>(to_float(pack.values[i]) * by);
    store_pack(x + vector * kEach<T>, pack);
  }
  for (int64_t i = vectors * kEach<T> + me; i < numel; i += all) x[i] = from_float<T>(to_float(x[i]) * by);
}

// --- launchers -------------------------------------------------------------------------------------------------------

Problem problem(const char* function, const LogitRows& x) {
  check_logit_rows(function, x);
  const int64_t bytes = x.dtype == DType::kFloat32 ? 4 : 2;
  check(is_aligned(x.logits) && x.stride * bytes % 16 == 0, function, ": rows of logits must lie on the 16-byte grid; ",
        "they are ", x.stride, " elements apart");
  check(x.v <= INT32_MAX / 8 && x.rows * kMostBlocks <= INT32_MAX, function, ": logits are (", x.rows, ", ", x.v,
        "), too many for one call");
  return {x.logits, x.stride, x.target, x.ignore_index, static_cast<int>(x.v), loss_factors<float>(x)};
}

// How many blocks hold a row; 0 when it is too short to be worth it, or too long.
int blocks_of_held_row(int64_t row_bytes) {
  if (row_bytes < kLeastHeldBytes) return 0;
  int blocks = 1;
  while (blocks < kMostBlocks && ceil_div(row_bytes, blocks) > kPartBytes) blocks *= 2;
  return ceil_div(row_bytes, 16 * blocks) * 16 <= kPartBytes ? blocks : 0;
}

template <typename T, bool kAll>
void launch_loss(const CrossEntropyArgs& args, const Problem& p, const Outputs& out, const Context& context) {
  const auto what = [&] { return concat("cross_entropy of (", args.x.rows, ", ", args.x.v, ") logits"); };
  const int vectors = static_cast<int>(ceil_div(args.x.v, kEach<T>));
  const int blocks = args.hold_rows && device_limits().wgmma ? blocks_of_held_row(vectors * int64_t{16}) : 0;
  if (blocks == 0) {
    launch(what, loss_kernel<T, kAll>, Grid{static_cast<unsigned>(args.x.rows), kThreads}, context, p, out, vectors);
    return;
  }
  const int part_vectors = static_cast<int>(ceil_div(vectors, blocks));
  const Grid grid{static_cast<unsigned>(args.x.rows * blocks), kHeldThreads, static_cast<unsigned>(part_vectors * 16),
                  static_cast<unsigned>(blocks)};
  launch(what, held_loss_kernel<T, kAll>, grid, context, p, out, blocks, part_vectors);
}

}  // namespace

void cross_entropy(const CrossEntropyArgs& args, const Context& context) {
  const Problem p = problem("cross_entropy", args.x);
  const Outputs out{static_cast<float*>(args.loss), static_cast<float*>(args.lse), static_cast<float*>(args.entropy),
                    static_cast<const float*>(args.divisor), args.gradient};
  dispatch("cross_entropy", args.x.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (args.entropy != nullptr || args.x.label_smoothing > 0.0) {
      launch_loss<T, true>(args, p, out, context);
    } else {
      launch_loss<T, false>(args, p, out, context);
    }
  });
}

void cross_entropy_backward(const CrossEntropyBackwardArgs& args, const Context& context) {
  const Problem p = problem("cross_entropy_backward", args.x);
  dispatch("cross_entropy_backward", args.x.dtype, [&](auto zero) {
    using T = decltype(zero);
    const int vectors = static_cast<int>(ceil_div(args.x.v, kEach<T>));
    const int parts = static_cast<int>(std::min<int64_t>(kMostBlocks, ceil_div(vectors, 4 * kBatch * kHeldThreads)));
    launch([&] { return concat("cross_entropy_backward of (", args.x.rows, ", ", args.x.v, ") logits"); },
           gradient_kernel<T>, Grid{static_cast<unsigned>(args.x.rows * parts), kHeldThreads}, context, p,
           static_cast<const float*>(args.lse), static_cast<const float*>(args.grad),
           static_cast<int>(ceil_div(vectors, parts)), parts);
  });
}

void scale(const ScaleArgs& args, const Context& context) {
  constexpr int64_t kMostGrid = 2048;  // few blocks, because most calls find that there is nothing to do
  dispatch("scale", args.dtype, [&](auto zero) {
    using T = decltype(zero);
    launch([&] { return concat("scale of ", args.numel, " elements"); }, scale_kernel<T>,
           cover(args.numel, kThreads * kEach<T>, kThreads, kMostGrid), context, static_cast<T*>(args.x), args.numel,
           static_cast<const float*>(args.factor), static_cast<const float*>(args.divisor), is_aligned(args.x));
  });
}

}  // namespace fastpeft::cuda
