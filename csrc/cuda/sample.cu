// Drawing the next token of each row on CUDA: one launch, no sort, nothing to the host.
//
// Plan     A block takes a row and reads it a few times; it stays in L2. First the largest x, then the sum of the
//          log-probability; greedy rows end there. Cuts look for the least x that is kept, as its bits in an order that
//          is that of the numbers, four bits a round from the top: each thread counts its elements into sixteen bins of
//          its own in shared memory (atomics would meet at a few bins), and a warp sums a bin. Only those that agree in
//          all bits so far are counted, so later rounds skip almost all. Then warps sum the masses of stretches of the
//          row; the one with the drawn place walks its stretch.
// Sums     masses are integers and counts too, so no order matters; the float32 sum is made in a fixed order.
#include "fastpeft/sample.h"

#include <cmath>

#include "common/integer.h"
#include "common/sample_math.h"
#include "cuda/device/launch.cuh"
#include "cuda/device/numbers.cuh"
#include "cuda/device/ptx.cuh"

namespace fastpeft::cuda {
namespace {

constexpr int kThreads = 512, kWarps = kThreads / 32;
constexpr int kBits = 4, kBins = 1 << kBits;
static_assert(kBins == kWarps, "a warp sums a bin");
constexpr int kStrip = 8 * 32;  // elements that a warp walks at a time

// Bits in the order of the numbers; NaN before all.
__device__ inline uint32_t key_of(float x) {
  if (isnan(x)) return 0;
  const uint32_t bits = __float_as_uint(x);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

template <typename T>
struct Row {
  const T* logits;
  const uint8_t* seen;  // null: no penalty
  const int64_t* stop_ids;
  int64_t stop_count;  // of those that cannot be drawn now
  float penalty;
  int v;

  __device__ float logit(int i) const { return to_float(logits[i]); }
  __device__ float x(int i) const {
    const float value = logit(i);
    if (stop_count > 0 && is_one_of(i, stop_ids, stop_count)) return -INFINITY;
    return seen != nullptr && seen[i] != 0 ? penalised(value, penalty) : value;
  }
};

// How much of the row a token has, by its x.
struct Mass {
  float largest, inverse_temperature;
  __device__ uint64_t operator()(float x) const {
    const float share = expf((x - largest) * inverse_temperature) * kMassOfLargest;
    return share >= 0.0f ? static_cast<uint64_t>(share) : 0;  // none for NaN
  }
};

// The same value in every thread; `each` is overwritten by the next call.
template <typename V, typename Join>
__device__ V join_block(V value, V* each, const Join& join) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) value = join(value, __shfl_xor_sync(~0u, value, distance));
  __syncthreads();
  if (threadIdx.x % 32 == 0) each[threadIdx.x / 32] = value;
  __syncthreads();
  value = each[0];
  for (int warp = 1; warp < kWarps; ++warp) value = join(value, each[warp]);
  return value;
}

struct Bins {
  uint64_t* masses;  // [kBins, kThreads]
  uint32_t* counts;
  uint64_t* mass_of;   // [kBins]
  uint32_t* count_of;  // [kBins]
};

// The largest key whose elements, with all above, are enough; all that are counted have keys from `floor` on.
template <typename T>
__device__ uint32_t find_key(const Row<T>& row, const Mass& mass, uint32_t floor, const Bins& bins,
                             uint32_t enough_count, uint64_t enough_mass) {
  uint32_t key = 0, count_above = 0;
  uint64_t mass_above = 0;
  for (int shift = 32 - kBits; shift >= 0; shift -= kBits) {
    for (int bin = 0; bin < kBins; ++bin) {
      bins.masses[bin * kThreads + threadIdx.x] = 0, bins.counts[bin * kThreads + threadIdx.x] = 0;
    }
    for (int i = threadIdx.x; i < row.v; i += kThreads) {
      const float x = row.x(i);
      const uint32_t own = key_of(x);
      const uint64_t differs = static_cast<uint64_t>(own ^ key) >> (shift + kBits);  // 64 bits: the first shift is 32
      if (differs != 0 || own < floor) continue;
      const int at = (own >> shift & (kBins - 1)) * kThreads + threadIdx.x;
      bins.masses[at] += mass(x), ++bins.counts[at];
    }
    __syncthreads();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    uint64_t mass_sum = 0;
    uint32_t count_sum = 0;
    for (int i = lane; i < kThreads; i += 32) {
      mass_sum += bins.masses[warp * kThreads + i], count_sum += bins.counts[warp * kThreads + i];
    }
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
      mass_sum += __shfl_xor_sync(~0u, mass_sum, distance), count_sum += __shfl_xor_sync(~0u, count_sum, distance);
    }
    if (lane == 0) bins.mass_of[warp] = mass_sum, bins.count_of[warp] = count_sum;
    __syncthreads();
    int bin = kBins - 1;
    while (bin > 0 &&
           (count_above + bins.count_of[bin] < enough_count || mass_above + bins.mass_of[bin] < enough_mass)) {
      count_above += bins.count_of[bin], mass_above += bins.mass_of[bin];
      --bin;
    }
    key |= static_cast<uint32_t>(bin) << shift;
    __syncthreads();
  }
  return key;
}

template <typename T>
__device__ uint64_t mass_from(const Row<T>& row, const Mass& mass, uint32_t floor, int begin, int end, int step) {
  uint64_t sum = 0;
  for (int i = begin; i < end; i += step) {
    const float x = row.x(i);
    if (key_of(x) >= floor) sum += mass(x);
  }
  return sum;
}

__device__ inline uint64_t sum_warp(uint64_t value) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(~0u, value, distance);
  return value;
}

// The element of [begin, end) that has the `place`-th of its masses; by one warp.
template <typename T>
__device__ int walk(const Row<T>& row, const Mass& mass, uint32_t floor, int begin, int end, uint64_t place) {
  const int lane = threadIdx.x % 32;
  for (int strip = begin; strip < end; strip += kStrip) {
    const int from = strip + lane * (kStrip / 32), to = min(from + kStrip / 32, end);
    const uint64_t own = mass_from(row, mass, floor, from, to, 1), all = sum_warp(own);
    if (place >= all) {
      place -= all;
      continue;
    }
    uint64_t before = own;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const uint64_t other = __shfl_up_sync(~0u, before, distance);
      if (lane >= distance) before += other;
    }
    before -= own;
    int found = -1;
    if (place >= before && place - before < own) {
      uint64_t left = place - before;
      for (found = from; found < to; ++found) {
        const float x = row.x(found);
        const uint64_t share = key_of(x) >= floor ? mass(x) : 0;
        if (left < share) break;
        left -= share;
      }
    }
    const unsigned finders = __ballot_sync(~0u, found >= 0);
    return __shfl_sync(~0u, found, __ffs(static_cast<int>(finders)) - 1);
  }
  return begin;
}

template <typename T>
__global__ void __launch_bounds__(kThreads) sample_kernel(const __grid_constant__ SampleArgs args) {
  extern __shared__ __align__(16) uint8_t shared[];
  __shared__ uint64_t each[kWarps], mass_of[kBins];
  __shared__ uint32_t count_of[kBins];
  __shared__ float each_float[kWarps];
  __shared__ int chosen;
  const int64_t number = blockIdx.x;
  if (args.lengths[number] < 0) return;
  const int v = static_cast<int>(args.v);
  const int64_t drawn = args.drawn[number];
  const float temperature = args.temperature[number];
  const Row<T> row{static_cast<const T*>(args.logits) + number * args.stride,
                   args.seen == nullptr ? nullptr : args.seen + number * args.v,
                   args.stop_ids,
                   drawn >= args.least[number] ? 0 : args.stop_count,
                   args.penalty[number],
                   v};

  uint64_t best = 0;  // the key, then what is greater for a smaller index
  float most = -INFINITY;
  for (int i = threadIdx.x; i < v; i += kThreads) {
    const uint64_t own = static_cast<uint64_t>(key_of(row.x(i))) << 32 | (0xFFFFFFFFu - static_cast<unsigned>(i));
    best = max(best, own);
    most = fmaxf(most, row.logit(i));
  }
  best = join_block(best, each, [](uint64_t a, uint64_t b) { return max(a, b); });
  most = join_block(most, each_float, [](float a, float b) { return fmaxf(a, b); });
  int token = static_cast<int>(0xFFFFFFFFu - static_cast<uint32_t>(best));
  const float inverse_temperature = temperature > 0.0f ? 1.0f / temperature : 1.0f;
  float sum = 0.0f;
  for (int i = threadIdx.x; i < v; i += kThreads) sum += expf((row.logit(i) - most) * inverse_temperature);
  sum = join_block(sum, each_float, [](float a, float b) { return a + b; });

  if (temperature > 0.0f) {
    const Mass mass{row.x(token), inverse_temperature};
    auto* masses = reinterpret_cast<uint64_t*>(shared);
    const Bins bins{masses, reinterpret_cast<uint32_t*>(masses + kBins * kThreads), mass_of, count_of};
    uint32_t floor = 1;  // all but NaN
    const int k = args.top_k[number];
    const float p = args.top_p[number];
#pragma unroll 1
    for (int cut = 0; cut < 2; ++cut) {  // the k largest, then of them the mass p
      if (cut == 0 ? k <= 0 || k >= v : p >= 1.0f) continue;
      uint64_t limit = 0;
      if (cut == 1) {
        const uint64_t own = mass_from(row, mass, floor, threadIdx.x, v, kThreads);
        limit = top_p_limit(join_block(own, each, [](uint64_t a, uint64_t b) { return a + b; }), p);
      }
      floor = max(floor, find_key(row, mass, floor, bins, cut == 0 ? static_cast<uint32_t>(k) : 0, limit));
    }
    const int stretch = static_cast<int>(ceil_div(ceil_div(v, kWarps), kStrip) * kStrip);
    const int warp = threadIdx.x / 32, begin = min(v, warp * stretch), end = min(v, begin + stretch);
    const uint64_t own = sum_warp(mass_from(row, mass, floor, begin + static_cast<int>(threadIdx.x % 32), end, 32));
    __syncthreads();
    if (threadIdx.x % 32 == 0) each[warp] = own;
    if (threadIdx.x == 0) chosen = 0;
    __syncthreads();
    uint64_t total = 0, before = 0;
    for (int other = 0; other < kWarps; ++other) {
      if (other == warp) before = total;
      total += each[other];
    }
    if (total > 0) {
      const uint64_t place = drawn_place(total, args.seed[number], drawn);
      if (place >= before && place - before < own) {
        const int found = walk(row, mass, floor, begin, end, place - before);
        if (threadIdx.x % 32 == 0) chosen = found;
      }
    }
    __syncthreads();
    token = chosen;
  }
  __syncthreads();  // all have read the row's state
  if (threadIdx.x > 0) return;
  args.token[number] = token;
  args.logprob[number] = (row.logit(token) - most) * inverse_temperature - logf(sum);
  if (args.seen != nullptr) args.seen[number * args.v + token] = 1;
  ++args.lengths[number];
  ++args.drawn[number];
}

}  // namespace

void sample(const SampleArgs& args, const Context& context) {
  check_sample(args);
  check(args.rows <= INT32_MAX, "sample: ", args.rows, " rows are too many for one call");
  constexpr unsigned kSmemBytes = kBins * kThreads * (sizeof(uint64_t) + sizeof(uint32_t));
  dispatch("sample", args.dtype, [&](auto zero) {
    launch([&] { return concat("sample of (", args.rows, ", ", args.v, ") logits"); }, sample_kernel<decltype(zero)>,
           Grid{static_cast<unsigned>(args.rows), kThreads, kSmemBytes}, context, args);
  });
}

}  // namespace fastpeft::cuda
