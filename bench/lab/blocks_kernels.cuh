// Variants of the block kernels: how many threads and packs, which hints, what is asked for before the wait. bf16 only.
#pragma once

#include "common/glu_math.h"
#include "cuda/device/hopper.cuh"
#include "lab.cuh"

namespace variants {

constexpr int kN = 8;  // bf16 of 16 bytes
using T16 = BFloat16;
using P16 = Pack<T16, kN>;

// --- accesses
// ---------------------------------------------------------------------------------------------------------

enum Load { kPlain, kOnce, kFirst, kOnceFirst, kStreamed, kFetch256 };
enum Store { kKeep, kCs, kOut };  // kOut: evicted from L2 first

__device__ inline uint64_t evict_first() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

template <int kLoad>
__device__ P16 load(bool wanted, const T16* from) {
  uint4 v{0, 0, 0, 0};
  const unsigned w = wanted;
  if constexpr (kLoad == kPlain) {
    asm volatile("{ .reg .pred p; setp.ne.u32 p, %5, 0; @p ld.global.v4.u32 {%0, %1, %2, %3}, [%4]; }"
                 : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)
                 : "l"(from), "r"(w)
                 : "memory");
  } else if constexpr (kLoad == kOnce) {
    asm volatile("{ .reg .pred p; setp.ne.u32 p, %5, 0; @p ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4]; }"
                 : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)
                 : "l"(from), "r"(w)
                 : "memory");
  } else if constexpr (kLoad == kFirst) {
    asm volatile(
        "{ .reg .pred p; setp.ne.u32 p, %5, 0; @p ld.global.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %6; }"
        : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)
        : "l"(from), "r"(w), "l"(evict_first())
        : "memory");
  } else if constexpr (kLoad == kOnceFirst) {
    asm volatile(
        "{ .reg .pred p; setp.ne.u32 p, %5, 0; @p ld.global.L1::no_allocate.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, "
        "[%4], %6; }"
        : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)
        : "l"(from), "r"(w), "l"(evict_first())
        : "memory");
  } else if constexpr (kLoad == kStreamed) {
    asm volatile("{ .reg .pred p; setp.ne.u32 p, %5, 0; @p ld.global.cs.v4.u32 {%0, %1, %2, %3}, [%4]; }"
                 : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)
                 : "l"(from), "r"(w)
                 : "memory");
  } else {
    asm volatile(
        "{ .reg .pred p; setp.ne.u32 p, %5, 0; @p ld.global.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4]; }"
        : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)
        : "l"(from), "r"(w)
        : "memory");
  }
  P16 pack;
  reinterpret_cast<uint4&>(pack) = v;
  return pack;
}

template <int kStore>
__device__ void store(bool wanted, T16* to, const P16& pack) {
  const uint4 v = reinterpret_cast<const uint4&>(pack);
  const unsigned w = wanted;
  if constexpr (kStore == kKeep) {
    store_16_if(wanted, to, v);
  } else if constexpr (kStore == kCs) {
    asm volatile("{ .reg .pred p; setp.ne.u32 p, %5, 0; @p st.global.cs.v4.u32 [%4], {%0, %1, %2, %3}; }" ::"r"(v.x),
                 "r"(v.y), "r"(v.z), "r"(v.w), "l"(to), "r"(w)
                 : "memory");
  } else {
    asm volatile(
        "{ .reg .pred p; setp.ne.u32 p, %5, 0; @p st.global.L2::cache_hint.v4.u32 [%4], {%0, %1, %2, %3}, %6; }" ::"r"(
            v.x),
        "r"(v.y), "r"(v.z), "r"(v.w), "l"(to), "r"(w), "l"(evict_first())
        : "memory");
  }
}

// Into L2, which the kernel before writes through: harmless before the wait.
__device__ inline void fetch_l2(const void* from, unsigned bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
}

// Which blocks ask for their own data before the wait, and how many blocks ahead each asks besides.
struct Early {
  unsigned blocks = 0, ahead = 0;
};

template <typename Fetch>
__device__ void fetch_early(const Early& early, const Fetch& fetch) {
  if (blockIdx.x < early.blocks) fetch(blockIdx.x);
  if (early.ahead > 0 && blockIdx.x + early.ahead < gridDim.x) fetch(blockIdx.x + early.ahead);
}

// --- element-wise: copy, SwiGLU forward and backward
// --------------------------------------------------------------------

struct Math {
  __device__ static float exp(float x) { return __expf(x); }
  __device__ static float divide(float a, float b) { return __fdividef(a, b); }
  __device__ static float erf(float x) { return erff(x); }
};

enum Op { kCopy, kGlu, kGluBackward };

struct ElementArgs {
  const T16* in[3];
  T16* out[2];
  int64_t packs;
  Early early;
};

template <int kOp, int kT, int kP, int kL, int kS, int kMin>
__global__ void __launch_bounds__(kT, kMin) element_kernel(const __grid_constant__ ElementArgs args) {
  constexpr int kIns = kOp == kCopy ? 1 : kOp == kGlu ? 2 : 3;
  let_next_kernel_start();
  if (threadIdx.x < kIns) {
    fetch_early(args.early, [&](unsigned block) {
      const int64_t first = int64_t{block} * (kT * kP);
      const unsigned count = static_cast<unsigned>(min(int64_t{kT * kP}, args.packs - first));
      fetch_l2(args.in[threadIdx.x] + first * kN, 16 * count);
    });
  }
  wait_for_kernel_before();
  const int64_t first = int64_t{blockIdx.x} * (kT * kP) + threadIdx.x;
  P16 in[kP][kIns];
#pragma unroll
  for (int p = 0; p < kP; ++p) {
    const int64_t at = first + p * kT;
#pragma unroll
    for (int i = 0; i < kIns; ++i) in[p][i] = load<kL>(at < args.packs, args.in[i] + at * kN);
  }
#pragma unroll
  for (int p = 0; p < kP; ++p) {
    const int64_t at = first + p * kT;
    P16 a, b;
    if constexpr (kOp == kCopy) {
      a = in[p][0];
    } else {
#pragma unroll
      for (int j = 0; j < kN; ++j) {
        const auto act = activation<GluKind::kSilu, Math>(to_float(in[p][0].values[j]));
        if constexpr (kOp == kGlu) {
          a.values[j] = from_float<T16>(act.value * to_float(in[p][1].values[j]));
        } else {
          const float g = to_float(in[p][2].values[j]);
          a.values[j] = from_float<T16>(g * to_float(in[p][1].values[j]) * act.slope);
          b.values[j] = from_float<T16>(g * act.value);
        }
      }
    }
    store<kS>(at < args.packs, args.out[0] + at * kN, a);
    if constexpr (kOp == kGluBackward) store<kS>(at < args.packs, args.out[1] + at * kN, b);
  }
}

// A copy by bulk copies through shared memory: a thread of each block keeps kStages chunks of kBytes on their way.
template <int kStages, int kBytes>
__global__ void __launch_bounds__(32) bulk_copy_kernel(const __grid_constant__ ElementArgs args) {
  extern __shared__ __align__(128) uint8_t ring[];
  __shared__ __align__(8) uint64_t full[kStages];
  let_next_kernel_start();
  if (threadIdx.x != 0) return;
  for (int s = 0; s < kStages; ++s) barrier_init(shared_offset(&full[s]), 1);
  barrier_init_fence();
  wait_for_kernel_before();
  const int64_t bytes = args.packs * 16, chunks = bytes / kBytes;
  const auto* from = reinterpret_cast<const uint8_t*>(args.in[0]);
  auto* to = reinterpret_cast<uint8_t*>(args.out[0]);
  const auto chunk_of = [&](int64_t i) { return blockIdx.x + i * gridDim.x; };
  const auto ask = [&](int64_t i) {
    if (chunk_of(i) >= chunks) return;
    const uint32_t barrier = shared_offset(&full[i % kStages]);
    barrier_arrive_expect(barrier, kBytes);
    bulk_load(shared_offset(ring + i % kStages * kBytes), from + chunk_of(i) * kBytes, kBytes, barrier);
  };
  for (int i = 0; i < kStages - 1; ++i) ask(i);
  for (int64_t i = 0; chunk_of(i) < chunks; ++i) {
    barrier_wait(shared_offset(&full[i % kStages]), i / kStages % 2);
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to + chunk_of(i) * kBytes),
                 "r"(shared_offset(ring + i % kStages * kBytes)), "r"(kBytes)
                 : "memory");
    tma_commit();
    asm volatile("cp.async.bulk.wait_group.read 1;" ::: "memory");  // the store before this has left its stage
    ask(i + kStages - 1);
  }
  tma_wait();
}

// --- sums
// -------------------------------------------------------------------------------------------------------------

template <int kLanes>
__device__ float sum_lanes(float v) {
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) v += __shfl_xor_sync(~0u, v, distance);
  return v;
}
template <int kT>
__device__ float sum_block(float v, float* warp_sums) {
  constexpr int kWarps = kT / 32;
  v = sum_lanes<32>(v);
  if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = v;
  __syncthreads();
  return sum_lanes<kWarps>(warp_sums[threadIdx.x % kWarps]);
}

struct NormArgs {
  const T16 *x, *residual, *weight;
  T16 *y, *h;
  float* rstd;
  int rows, packs;
  float inverse_width, eps, offset;
  Early early;
};

__device__ inline P16 scaled(const P16& x, const P16& w, float rstd, float offset) {
  P16 y;
#pragma unroll
  for (int j = 0; j < kN; ++j) {
    const float n = to_float(from_float<T16>(to_float(x.values[j]) * rstd));
    y.values[j] = from_float<T16>(n * (to_float(w.values[j]) + offset));
  }
  return y;
}
__device__ inline P16 added(const P16& x, const P16& r) {
  P16 h;
#pragma unroll
  for (int j = 0; j < kN; ++j) h.values[j] = from_float<T16>(to_float(x.values[j]) + to_float(r.values[j]));
  return h;
}
__device__ inline float square(const P16& x) {
  float sum = 0.0f;
#pragma unroll
  for (int j = 0; j < kN; ++j) sum += to_float(x.values[j]) * to_float(x.values[j]);
  return sum;
}

// --- norm forward, a row a block
// --------------------------------------------------------------------------------------

template <int kT, int kP, int kL, int kS, bool kResidual, bool kEarlyWeight, int kMin>
__global__ void __launch_bounds__(kT, kMin) norm_kernel(const __grid_constant__ NormArgs args) {
  __shared__ float warp_sums[32];
  let_next_kernel_start();
  const int lane = threadIdx.x;
  if (lane < (kResidual ? 2 : 1)) {
    fetch_early(args.early, [&](unsigned block) {
      fetch_l2((lane == 0 ? args.x : args.residual) + int64_t{block} * args.packs * kN, 16 * args.packs);
    });
  }
  P16 w[kP];
  if constexpr (kEarlyWeight) {
#pragma unroll
    for (int i = 0; i < kP; ++i) w[i] = load<kPlain>(lane + i * kT < args.packs, args.weight + (lane + i * kT) * kN);
  }
  wait_for_kernel_before();
  const int64_t row = blockIdx.x, start = row * args.packs * kN;
  P16 x[kP], r[kP];
#pragma unroll
  for (int i = 0; i < kP; ++i) x[i] = load<kL>(lane + i * kT < args.packs, args.x + start + (lane + i * kT) * kN);
  if constexpr (kResidual) {
#pragma unroll
    for (int i = 0; i < kP; ++i) {
      r[i] = load<kL>(lane + i * kT < args.packs, args.residual + start + (lane + i * kT) * kN);
    }
#pragma unroll
    for (int i = 0; i < kP; ++i) {
      x[i] = added(x[i], r[i]);
      store<kS>(lane + i * kT < args.packs, args.h + start + (lane + i * kT) * kN, x[i]);
    }
  }
  if constexpr (!kEarlyWeight) {
#pragma unroll
    for (int i = 0; i < kP; ++i) w[i] = load<kPlain>(lane + i * kT < args.packs, args.weight + (lane + i * kT) * kN);
  }
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kP; ++i) sum += square(x[i]);
  const float rstd = rsqrtf(sum_block<kT>(sum, warp_sums) * args.inverse_width + args.eps);
  if (lane == 0) args.rstd[row] = rstd;
#pragma unroll
  for (int i = 0; i < kP; ++i) keep_packed(x[i]);
#pragma unroll
  for (int i = 0; i < kP; ++i) {
    store<kS>(lane + i * kT < args.packs, args.y + start + (lane + i * kT) * kN, scaled(x[i], w[i], rstd, args.offset));
  }
}

// Blocks that stay, and ask for rows kD ahead.
template <int kT, int kP, int kD, int kL, int kS>
__global__ void __launch_bounds__(kT, 1024 / kT) norm_ring_kernel(const __grid_constant__ NormArgs args) {
  __shared__ float warp_sums[2][32];
  let_next_kernel_start();
  const int lane = threadIdx.x;
  if (args.early.blocks > 0 && lane < kD && blockIdx.x + lane * gridDim.x < args.rows) {
    fetch_l2(args.x + (blockIdx.x + lane * int64_t{gridDim.x}) * args.packs * kN, 16 * args.packs);
  }
  P16 w[kP], x[kD][kP];
#pragma unroll
  for (int i = 0; i < kP; ++i) w[i] = load<kPlain>(lane + i * kT < args.packs, args.weight + (lane + i * kT) * kN);
  wait_for_kernel_before();
  const auto ask = [&](P16(&to)[kP], int row) {
#pragma unroll
    for (int i = 0; i < kP; ++i) {
      to[i] = load<kL>(row < args.rows && lane + i * kT < args.packs,
                       args.x + int64_t{row} * args.packs * kN + (lane + i * kT) * kN);
    }
  };
  const int step = gridDim.x;
  int row = blockIdx.x, turn = 0;
#pragma unroll
  for (int d = 0; d < kD; ++d) ask(x[d], row + d * step);
  while (row < args.rows) {
#pragma unroll
    for (int d = 0; d < kD; ++d) {
      if (row >= args.rows) break;
      P16 now[kP];
#pragma unroll
      for (int i = 0; i < kP; ++i) now[i] = x[d][i];
      ask(x[d], row + kD * step);
      float sum = 0.0f;
#pragma unroll
      for (int i = 0; i < kP; ++i) sum += square(now[i]);
      const float rstd = rsqrtf(sum_block<kT>(sum, warp_sums[turn]) * args.inverse_width + args.eps);
      turn ^= 1;
      if (lane == 0) args.rstd[row] = rstd;
#pragma unroll
      for (int i = 0; i < kP; ++i) {
        keep_packed(now[i]);
        store<kS>(lane + i * kT < args.packs, args.y + int64_t{row} * args.packs * kN + (lane + i * kT) * kN,
                  scaled(now[i], w[i], rstd, args.offset));
      }
      row += step;
    }
  }
}

// --- norm forward, rows that share a warp: kLanes threads a row, kP packs each, kR rows a thread
// ------------------------

template <int kT, int kLanes, int kP, int kR, int kL, int kS, bool kEarlyWeight, int kMin>
__global__ void __launch_bounds__(kT, kMin) heads_kernel(const __grid_constant__ NormArgs args) {
  constexpr int kGroups = kT / kLanes;
  let_next_kernel_start();
  const int lane = threadIdx.x % kLanes, group = threadIdx.x / kLanes;
  if (threadIdx.x == 0) {
    fetch_early(args.early, [&](unsigned block) {
      const int64_t row = int64_t{block} * (kGroups * kR);
      const int64_t rows = min(int64_t{kGroups * kR}, args.rows - row);
      fetch_l2(args.x + row * args.packs * kN, 16 * args.packs * static_cast<unsigned>(rows));
    });
  }
  P16 w[kP];
  if constexpr (kEarlyWeight) {
#pragma unroll
    for (int i = 0; i < kP; ++i) {
      w[i] = load<kPlain>(lane + i * kLanes < args.packs, args.weight + (lane + i * kLanes) * kN);
    }
  }
  wait_for_kernel_before();
  const int64_t first = int64_t{blockIdx.x} * (kGroups * kR) + group;
  P16 x[kR][kP];
#pragma unroll
  for (int r = 0; r < kR; ++r) {
#pragma unroll
    for (int i = 0; i < kP; ++i) {
      const int64_t row = first + r * kGroups;
      x[r][i] = load<kL>(row < args.rows && lane + i * kLanes < args.packs,
                         args.x + row * args.packs * kN + (lane + i * kLanes) * kN);
    }
  }
  if constexpr (!kEarlyWeight) {
#pragma unroll
    for (int i = 0; i < kP; ++i) {
      w[i] = load<kPlain>(lane + i * kLanes < args.packs, args.weight + (lane + i * kLanes) * kN);
    }
  }
#pragma unroll
  for (int r = 0; r < kR; ++r) {
    const int64_t row = first + r * kGroups;
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kP; ++i) sum += square(x[r][i]);
    const float rstd = rsqrtf(sum_lanes<kLanes>(sum) * args.inverse_width + args.eps);
    if (row < args.rows && lane == 0) args.rstd[row] = rstd;
#pragma unroll
    for (int i = 0; i < kP; ++i) {
      keep_packed(x[r][i]);
      store<kS>(row < args.rows && lane + i * kLanes < args.packs,
                args.y + row * args.packs * kN + (lane + i * kLanes) * kN, scaled(x[r][i], w[i], rstd, args.offset));
    }
  }
}

// --- norm backward
// ----------------------------------------------------------------------------------------------------

struct BackwardArgs {
  const T16 *dy, *h, *dh, *weight;
  const float* rstd;
  T16 *dx, *dweight;
  float* partials;
  unsigned* arrived;
  int rows, packs;
  float inverse_width, offset;
  Early early;
};

__device__ inline float products(const P16& dy, const P16& h, const P16& w, float rstd, float offset) {
  float sum = 0.0f;
#pragma unroll
  for (int j = 0; j < kN; ++j) {
    sum += to_float(dy.values[j]) * (to_float(w.values[j]) + offset) * (to_float(h.values[j]) * rstd);
  }
  return sum;
}
__device__ inline P16 gradient(const P16& dy, const P16& h, const P16& dh, const P16& w, float rstd, float mean,
                               float offset) {
  P16 dx;
#pragma unroll
  for (int j = 0; j < kN; ++j) {
    const float n = to_float(h.values[j]) * rstd, g = to_float(dy.values[j]) * (to_float(w.values[j]) + offset);
    dx.values[j] = from_float<T16>(rstd * (g - n * mean) + to_float(dh.values[j]));
  }
  return dx;
}

template <int kT, int kP, int kL, int kS, bool kDh, int kMin>
__global__ void __launch_bounds__(kT, kMin) backward_kernel(const __grid_constant__ BackwardArgs args) {
  __shared__ float warp_sums[32];
  let_next_kernel_start();
  const int lane = threadIdx.x;
  if (lane < (kDh ? 3 : 2)) {
    fetch_early(args.early, [&](unsigned block) {
      const T16* from = lane == 0 ? args.dy : lane == 1 ? args.h : args.dh;
      fetch_l2(from + int64_t{block} * args.packs * kN, 16 * args.packs);
    });
  }
  wait_for_kernel_before();
  const int64_t row = blockIdx.x, start = row * args.packs * kN;
  P16 dy[kP], h[kP], dh[kP], w[kP];
#pragma unroll
  for (int i = 0; i < kP; ++i) {
    dy[i] = load<kL>(lane + i * kT < args.packs, args.dy + start + (lane + i * kT) * kN);
    h[i] = load<kL>(lane + i * kT < args.packs, args.h + start + (lane + i * kT) * kN);
  }
  const float rstd = load_4(args.rstd + row);
#pragma unroll
  for (int i = 0; i < kP; ++i) {
    dh[i] = load<kL>(kDh && lane + i * kT < args.packs, args.dh + start + (lane + i * kT) * kN);
    w[i] = load<kPlain>(lane + i * kT < args.packs, args.weight + (lane + i * kT) * kN);
  }
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kP; ++i) sum += products(dy[i], h[i], w[i], rstd, args.offset);
  const float mean = sum_block<kT>(sum, warp_sums) * args.inverse_width;
#pragma unroll
  for (int i = 0; i < kP; ++i) keep_packed(dy[i]), keep_packed(h[i]), keep_packed(w[i]);
#pragma unroll
  for (int i = 0; i < kP; ++i) {
    store<kS>(lane + i * kT < args.packs, args.dx + start + (lane + i * kT) * kN,
              gradient(dy[i], h[i], dh[i], w[i], rstd, mean, args.offset));
  }
}

// Blocks that stay: sums of dweight and rows kD ahead in registers.
template <int kT, int kP, int kD, int kL, int kS, bool kDh, bool kBarrier, int kAnSm>
__global__ void __launch_bounds__(kT, kAnSm) dweight_kernel(const __grid_constant__ BackwardArgs args) {
  __shared__ float warp_sums[2][32];
  let_next_kernel_start();
  const int lane = threadIdx.x, step = gridDim.x;
  if (args.early.blocks > 0 && lane < kD * (kDh ? 3 : 2)) {
    const int64_t row = blockIdx.x + int64_t{lane % kD} * step;
    const T16* from = lane / kD == 0 ? args.dy : lane / kD == 1 ? args.h : args.dh;
    if (row < args.rows) fetch_l2(from + row * args.packs * kN, 16 * args.packs);
  }
  P16 w[kP];
#pragma unroll
  for (int i = 0; i < kP; ++i) w[i] = load<kPlain>(lane + i * kT < args.packs, args.weight + (lane + i * kT) * kN);
  wait_for_kernel_before();
  P16 dy[kD][kP], h[kD][kP], dh[kD][kP];
  float rstd[kD], sums[kP][kN] = {};
  const auto ask = [&](int d, int row) {
    const bool any = row < args.rows;
    const int64_t start = int64_t{row} * args.packs * kN;
#pragma unroll
    for (int i = 0; i < kP; ++i) {
      dy[d][i] = load<kL>(any && lane + i * kT < args.packs, args.dy + start + (lane + i * kT) * kN);
      h[d][i] = load<kL>(any && lane + i * kT < args.packs, args.h + start + (lane + i * kT) * kN);
      dh[d][i] = load<kL>(kDh && any && lane + i * kT < args.packs, args.dh + start + (lane + i * kT) * kN);
    }
    rstd[d] = any ? load_4(args.rstd + row) : 0.0f;
  };
  int row = blockIdx.x, turn = 0;
#pragma unroll
  for (int d = 0; d < kD; ++d) ask(d, row + d * step);
  while (row < args.rows) {
#pragma unroll
    for (int d = 0; d < kD; ++d) {
      if (row >= args.rows) break;
      float sum = 0.0f;
#pragma unroll
      for (int i = 0; i < kP; ++i) {
        sum += products(dy[d][i], h[d][i], w[i], rstd[d], args.offset);
#pragma unroll
        for (int j = 0; j < kN; ++j) {
          const float n = to_float(from_float<T16>(to_float(h[d][i].values[j]) * rstd[d]));
          sums[i][j] += to_float(dy[d][i].values[j]) * n;
        }
      }
      const float mean = sum_block<kT>(sum, warp_sums[turn]) * args.inverse_width;
      turn ^= 1;
#pragma unroll
      for (int i = 0; i < kP; ++i) {
        keep_packed(dy[d][i]), keep_packed(h[d][i]), keep_packed(w[i]);
        store<kS>(lane + i * kT < args.packs, args.dx + int64_t{row} * args.packs * kN + (lane + i * kT) * kN,
                  gradient(dy[d][i], h[d][i], dh[d][i], w[i], rstd[d], mean, args.offset));
      }
      ask(d, row + kD * step);
      row += step;
    }
  }
  float* partial = args.partials + int64_t{blockIdx.x} * args.packs * kN;
#pragma unroll
  for (int i = 0; i < kP; ++i) {
    if (lane + i * kT >= args.packs) continue;
    float4* to = reinterpret_cast<float4*>(partial + (lane + i * kT) * kN);
    to[0] = make_float4(sums[i][0], sums[i][1], sums[i][2], sums[i][3]);
    to[1] = make_float4(sums[i][4], sums[i][5], sums[i][6], sums[i][7]);
  }
  if constexpr (kBarrier) {  // an experiment: the sums by the same blocks, behind a barrier of the grid
    __threadfence();
    __syncthreads();
    if (lane == 0) {
      const unsigned turn_of = atomicAdd(args.arrived, 1) / gridDim.x;
      while (*static_cast<volatile unsigned*>(args.arrived) / gridDim.x == turn_of) {
      }
      __threadfence();
    }
    __syncthreads();
    const int columns = args.packs * kN, warps = kT / 32, slice = lane / 32;
    __shared__ float slices[16][33];
    for (int column = blockIdx.x * 32; column < columns; column += gridDim.x * 32) {
      float sum = 0.0f;
#pragma unroll 9
      for (int r = slice; r < static_cast<int>(gridDim.x); r += warps) {
        sum += __ldcg(args.partials + int64_t{r} * columns + column + lane % 32);
      }
      slices[slice][lane % 32] = sum;
      __syncthreads();
      if (slice == 0) {
        for (int i = 1; i < warps; ++i) sum += slices[i][lane];
        args.dweight[column + lane] = from_float<T16>(sum);
      }
      __syncthreads();
    }
  }
}

// The partial sums: eight lanes of four columns, 64 slices of rows, added in a fixed order.
static __global__ void __launch_bounds__(512) sum_kernel(const float* partials, int rows, int columns, T16* dweight) {
  __shared__ float4 of_warp[16][8];
  let_next_kernel_start();
  wait_for_kernel_before();
  const int lane = threadIdx.x % 8, slice = threadIdx.x / 8, column = blockIdx.x * 32 + 4 * lane;
  float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll 4
  for (int row = slice; row < rows; row += 64) {
    const float4 v = __ldcg(reinterpret_cast<const float4*>(partials + int64_t{row} * columns + column));
    sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
  }
#pragma unroll
  for (int distance = 8; distance < 32; distance *= 2) {
    sum.x += __shfl_xor_sync(~0u, sum.x, distance), sum.y += __shfl_xor_sync(~0u, sum.y, distance);
    sum.z += __shfl_xor_sync(~0u, sum.z, distance), sum.w += __shfl_xor_sync(~0u, sum.w, distance);
  }
  if (threadIdx.x % 32 < 8) of_warp[threadIdx.x / 32][lane] = sum;
  __syncthreads();
  if (threadIdx.x >= 32) return;
  const float* sums = &of_warp[0][0].x;
  float total = 0.0f;
#pragma unroll
  for (int i = 0; i < 16; ++i) total += sums[i * 32 + threadIdx.x];
  dweight[blockIdx.x * 32 + threadIdx.x] = from_float<T16>(total);
}

}  // namespace variants
