// Drawing the next token of each row on CUDA: two launches, no sort, nothing to the host.
//
// Plan     part_kernel: a block holds kSamplePart logits of a row in registers and gives their largest x, their largest
//          logit, and the sum of exponentials relative to it; so a few rows occupy many multiprocessors.
//          draw_kernel: a block joins the parts of a row; greedy rows end there. Others are read a few times more, from
//          L2. Cuts look for the least x that is kept, as its bits in an order that is that of the numbers, four bits a
//          round from the top: each thread counts its elements into sixteen bins of its own in shared memory (atomics
//          would meet at a few bins), and a warp sums a bin. Only those that agree in all bits so far are counted, so
//          later rounds skip almost all. Then warps sum the masses of stretches of the row; the one with the drawn
//          place walks its stretch.
//          Not one launch whose last block goes on: the bins' shared memory would leave room for few blocks of parts,
//          and on Hopper the second kernel is in place when the first ends.
// Loads    16-byte packs where a row lies on the 16-byte grid; else, and at its end, single elements. Which thread has
//          an element does not depend on that.
// Sums     masses are integers and counts too, so no order matters; float32 sums are made in a fixed order, which does
//          not depend on the number of rows.
#include "fastpeft/sample.h"

#include <cmath>

#include "common/integer.h"
#include "common/sample_math.h"
#include "cuda/device/launch.cuh"
#include "cuda/device/numbers.cuh"
#include "cuda/device/ptx.cuh"
#include "cuda/sample_config.h"

namespace fastpeft::cuda {
namespace {

constexpr int kPartThreads = 256;
constexpr int kThreads = 512, kWarps = kThreads / 32;
constexpr int kBits = 4, kBins = 1 << kBits;
static_assert(kBins == kWarps, "a warp sums a bin");
constexpr float kLog2E = 1.44269504088896f;

template <typename T>
constexpr int kEach = 16 / sizeof(T);

// --- a row -----------------------------------------------------------------------------------------------------------

// Bits in the order of the numbers; NaN before all, both zeros alike.
__device__ inline uint32_t key_of(float x) {
  if (isnan(x)) return 0;
  const uint32_t bits = __float_as_uint(x + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

template <typename T>
struct Row {
  const T* logits;
  const uint8_t* seen;  // null: no penalty
  const int64_t* stop_ids;
  int64_t stop_count;  // of those that cannot be drawn now
  float penalty, inverse_temperature;
  int v;
  bool in_packs;  // on the 16-byte grid

  __device__ Row(const SampleArgs& args, int64_t number)
      : logits(static_cast<const T*>(args.logits) + number * args.stride),
        seen(args.seen == nullptr || args.penalty[number] == 1.0f ? nullptr : args.seen + number * args.v),
        stop_ids(args.stop_ids),
        stop_count(args.drawn[number] >= args.least[number] ? 0 : args.stop_count),
        penalty(args.penalty[number]),
        inverse_temperature(args.temperature[number] > 0.0f ? 1.0f / args.temperature[number] : 1.0f),
        v(static_cast<int>(args.v)),
        in_packs(reinterpret_cast<uintptr_t>(logits) % 16 == 0) {}

  __device__ float logit(int i) const { return to_float(logits[i]); }
  __device__ bool is_plain() const { return stop_count == 0 && seen == nullptr; }  // x is the logit
  __device__ float x(int i, float logit) const {
    if (stop_count > 0 && is_one_of(i, stop_ids, stop_count)) return -INFINITY;
    return seen != nullptr && seen[i] != 0 ? penalised(logit, penalty) : logit;
  }

  // What there is before `end` of the packs at first, first + step, ...
  template <int kPacks>
  __device__ void read(int first, int step, int end, Pack<T, kEach<T>> (&packs)[kPacks]) const {
    constexpr int kN = kEach<T>;
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      const int at = first + i * step;
      packs[i] = load_pack_if<T, kN>(in_packs && at + kN <= end, logits + at);
    }
    if (in_packs && first + (kPacks - 1) * step + kN <= end) return;
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      const int at = first + i * step;
      if (in_packs && at + kN <= end) continue;
#pragma unroll
      for (int j = 0; j < kN; ++j) {
        if (at + j < end) packs[i].values[j] = logits[at + j];
      }
    }
  }
};

// Calls body(i, logit) for what there is before `end` of packs that were read, in their order.
template <typename T, int kPacks, typename Body>
__device__ void each_of(const Pack<T, kEach<T>> (&packs)[kPacks], int first, int step, int end, const Body& body) {
  constexpr int kN = kEach<T>;
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    const int at = first + i * step;
    const auto use = [&](int count) {
#pragma unroll
      for (int j = 0; j < kN; ++j) {
        if (j < count) body(at + j, to_float(packs[i].values[j]));
      }
    };
    if (at + kN <= end) {
      use(kN);
    } else {
      use(end - at);
    }
  }
}

// Calls body(i, logit) for the logits of [begin, end) that are of a thread's packs; begin is a whole number of packs.
template <typename T, typename Body>
__device__ void each_logit(const Row<T>& row, int begin, int end, int thread, int threads, const Body& body) {
  const int step = threads * kEach<T>;
  int first = begin + thread * kEach<T>;
  Pack<T, kEach<T>> pack[1], next[1];
  row.read(first, 0, end, next);
#pragma unroll 1
  for (; first < end; first += step) {
    pack[0] = next[0];
    row.read(first + step, 0, end, next);
    each_of<T>(pack, first, 0, end, body);
  }
}

// How much of the row a token has, by its x.
struct Mass {
  float largest, inverse_temperature;
  __device__ uint64_t operator()(float x) const {
    const float share = expf((x - largest) * inverse_temperature) * kMassOfLargest;
    return share >= 0.0f ? static_cast<uint64_t>(share) : 0;  // none for NaN
  }
};

template <typename V, typename Join>
__device__ V join_warp(V value, const Join& join) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) value = join(value, __shfl_xor_sync(~0u, value, distance));
  return value;
}

template <typename V>
__device__ V sum_warp(V value) {
  return join_warp(value, [](V a, V b) { return a + b; });
}

// The same value in every thread; `each` is overwritten by the next call.
__device__ inline uint64_t sum_block(uint64_t value, uint64_t* each) {
  value = sum_warp(value);
  __syncthreads();
  if (threadIdx.x % 32 == 0) each[threadIdx.x / 32] = value;
  __syncthreads();
  value = each[0];
  for (int warp = 1; warp < kWarps; ++warp) value += each[warp];
  return value;
}

// --- parts -----------------------------------------------------------------------------------------------------------

struct alignas(16) Part {
  uint64_t best;  // the key of the largest x, then what is greater for a smaller index; 0 if there is no element
  float most;     // the largest logit
  float sum;      // of exp((logit - most) / temperature)
};
static_assert(sizeof(Part) == kSamplePartBytes);

__device__ inline uint64_t larger(uint64_t a, uint64_t b) { return max(a, b); }

// exp((x - most) / temperature). Where all are -inf it is 0, so that such a part adds nothing to others.
__device__ inline float exp_from(float x, float most, float inverse_temperature) {
  return exp2_approx_ftz((x - (most == -INFINITY ? 0.0f : most)) * (inverse_temperature * kLog2E));
}

// Makes one of parts, by a warp, of which every lane gets it.
__device__ inline Part join_parts(const Part* parts, int count, float inverse_temperature) {
  const int lane = threadIdx.x % 32;
  Part whole{0, -INFINITY, 0.0f};
  for (int i = lane; i < count; i += 32) {
    whole.best = max(whole.best, parts[i].best), whole.most = fmaxf(whole.most, parts[i].most);
  }
  whole.best = join_warp(whole.best, larger);
  whole.most = join_warp(whole.most, fmaxf);
  for (int i = lane; i < count; i += 32) {
    whole.sum += parts[i].sum * exp_from(parts[i].most, whole.most, inverse_temperature);
  }
  whole.sum = sum_warp(whole.sum);
  return whole;
}

template <typename T>
__global__ void __launch_bounds__(kPartThreads) part_kernel(const __grid_constant__ SampleArgs args, int parts) {
  constexpr int kPacks = kSamplePart / kPartThreads / kEach<T>, kStep = kPartThreads * kEach<T>;
  __shared__ Part of_warps[kPartThreads / 32];
  let_next_kernel_start();
  wait_for_kernel_before();
  const int64_t number = blockIdx.x / static_cast<unsigned>(parts);
  if (args.lengths[number] < 0) return;
  const Row<T> row(args, number);
  const int begin = static_cast<int>(blockIdx.x % static_cast<unsigned>(parts)) * kSamplePart;
  const int end = min(row.v, begin + kSamplePart), first = begin + static_cast<int>(threadIdx.x) * kEach<T>;
  Pack<T, kEach<T>> packs[kPacks];
  row.read(first, kStep, end, packs);

  float largest = -INFINITY, most = -INFINITY;
  int at_largest = first;
  const auto take = [&](int i, float x) {
    if (x > largest) largest = x, at_largest = i;  // of equals the first
  };
  if (row.is_plain()) {
    each_of<T>(packs, first, kStep, end, take);
    most = largest;
  } else {
    each_of<T>(packs, first, kStep, end, [&](int i, float logit) {
      most = fmaxf(most, logit);
      take(i, row.x(i, logit));
    });
  }
  const uint64_t own = static_cast<uint64_t>(key_of(largest)) << 32 | (0xFFFFFFFFu - static_cast<unsigned>(at_largest));
  const uint64_t best = join_warp(first < end ? own : 0, larger);
  most = join_warp(most, fmaxf);
  float sum = 0.0f;
  each_of<T>(packs, first, kStep, end,
             [&](int, float logit) { sum += exp_from(logit, most, row.inverse_temperature); });
  sum = sum_warp(sum);
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = {best, most, sum};
  __syncthreads();
  if (threadIdx.x >= 32) return;
  const Part part = join_parts(of_warps, kPartThreads / 32, row.inverse_temperature);
  if (threadIdx.x == 0) static_cast<Part*>(args.partial)[blockIdx.x] = part;
}

// --- cuts ------------------------------------------------------------------------------------------------------------

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
    each_logit(row, 0, row.v, threadIdx.x, kThreads, [&](int i, float logit) {
      const float x = row.x(i, logit);
      const uint32_t own = key_of(x);
      const uint64_t differs = static_cast<uint64_t>(own ^ key) >> (shift + kBits);  // 64 bits: the first shift is 32
      if (differs != 0 || own < floor) return;
      const int at = (own >> shift & (kBins - 1)) * kThreads + threadIdx.x;
      bins.masses[at] += mass(x), ++bins.counts[at];
    });
    __syncthreads();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    uint64_t mass_sum = 0;
    uint32_t count_sum = 0;
    for (int i = lane; i < kThreads; i += 32) {
      mass_sum += bins.masses[warp * kThreads + i], count_sum += bins.counts[warp * kThreads + i];
    }
    mass_sum = sum_warp(mass_sum), count_sum = sum_warp(count_sum);
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

// --- draw ------------------------------------------------------------------------------------------------------------

// Of a thread's elements of [begin, end).
template <typename T>
__device__ uint64_t mass_from(const Row<T>& row, const Mass& mass, uint32_t floor, int begin, int end, int thread,
                              int threads) {
  uint64_t sum = 0;
  each_logit(row, begin, end, thread, threads, [&](int i, float logit) {
    const float x = row.x(i, logit);
    if (key_of(x) >= floor) sum += mass(x);
  });
  return sum;
}

// The element of [begin, end) that has the `place`-th of its masses; by one warp.
template <typename T>
__device__ int walk(const Row<T>& row, const Mass& mass, uint32_t floor, int begin, int end, uint64_t place) {
  constexpr int kN = kEach<T>;
  const int lane = threadIdx.x % 32;
  for (int strip = begin; strip < end; strip += 32 * kN) {
    const int from = strip + lane * kN;
    Pack<T, kN> pack[1];
    row.read(from, 0, end, pack);
    uint64_t masses[kN] = {}, own = 0;
    each_of<T>(pack, from, 0, end, [&](int i, float logit) {
      const float x = row.x(i, logit);
      if (key_of(x) >= floor) masses[i - from] = mass(x);
    });
#pragma unroll
    for (int i = 0; i < kN; ++i) own += masses[i];
    const uint64_t all = sum_warp(own);
    if (place >= all) {
      place -= all;
      continue;
    }
    uint64_t until = own;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const uint64_t other = __shfl_up_sync(~0u, until, distance);
      if (lane >= distance) until += other;
    }
    const bool is_here = place < until && place >= until - own;
    until -= own;
    int found = from;
#pragma unroll
    for (int i = 0; i < kN; ++i) {
      until += masses[i];
      if (until <= place) ++found;
    }
    const unsigned finders = __ballot_sync(~0u, is_here);
    return __shfl_sync(~0u, found, __ffs(static_cast<int>(finders)) - 1);
  }
  return begin;
}

template <typename T>
__global__ void __launch_bounds__(kThreads) draw_kernel(const __grid_constant__ SampleArgs args, int parts) {
  extern __shared__ __align__(16) uint8_t shared[];
  __shared__ uint64_t each[kWarps], mass_of[kBins];
  __shared__ uint32_t count_of[kBins];
  __shared__ int chosen;
  let_next_kernel_start();
  wait_for_kernel_before();
  const int64_t number = blockIdx.x;
  if (args.lengths[number] < 0) return;
  const Row<T> row(args, number);
  const int v = row.v;
  const Part whole =
      join_parts(static_cast<const Part*>(args.partial) + number * parts, parts, row.inverse_temperature);
  int token = static_cast<int>(0xFFFFFFFFu - static_cast<uint32_t>(whole.best));

  if (args.temperature[number] > 0.0f) {
    const Mass mass{row.x(token, row.logit(token)), row.inverse_temperature};
    auto* masses = reinterpret_cast<uint64_t*>(shared);
    const Bins bins{masses, reinterpret_cast<uint32_t*>(masses + kBins * kThreads), mass_of, count_of};
    uint32_t floor = 1;  // all but NaN
    const int k = args.top_k[number];
    const float p = args.top_p[number];
#pragma unroll 1
    for (int cut = 0; cut < 2; ++cut) {  // the k largest, then of them the mass p
      if (cut == 0 ? k <= 0 || k >= v : p >= 1.0f) continue;
      uint64_t limit = 0;
      if (cut == 1) limit = top_p_limit(sum_block(mass_from(row, mass, floor, 0, v, threadIdx.x, kThreads), each), p);
      floor = max(floor, find_key(row, mass, floor, bins, cut == 0 ? static_cast<uint32_t>(k) : 0, limit));
    }
    constexpr int kStrip = 32 * kEach<T>;
    const int stretch = static_cast<int>(ceil_div(ceil_div(v, kWarps), kStrip) * kStrip);
    const int warp = threadIdx.x / 32, begin = min(v, warp * stretch), end = min(v, begin + stretch);
    const uint64_t own = sum_warp(mass_from(row, mass, floor, begin, end, threadIdx.x % 32, 32));
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
      const uint64_t place = drawn_place(total, args.seed[number], args.drawn[number]);
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
  args.logprob[number] = (row.logit(token) - whole.most) * row.inverse_temperature - logf(whole.sum);
  if (args.seen != nullptr) args.seen[number * args.v + token] = 1;
  ++args.lengths[number];
  ++args.drawn[number];
}

}  // namespace

void sample(const SampleArgs& args, const Context& context) {
  check_sample(args);
  const int64_t parts = sample_parts(args.v), blocks = args.rows * parts;
  check(blocks <= INT32_MAX, "sample: ", args.rows, " rows are too many for one call");
  check(args.partial != nullptr || blocks == 0, "sample: got no workspace");
  constexpr unsigned kSmemBytes = kBins * kThreads * (sizeof(uint64_t) + sizeof(uint32_t));
  const auto what = [&] { return concat("sample of (", args.rows, ", ", args.v, ") logits"); };
  const bool overlap = device_limits().wgmma;
  dispatch("sample", args.dtype, [&](auto zero) {
    using T = decltype(zero);
    launch(what, part_kernel<T>,
           Grid{.blocks = static_cast<unsigned>(blocks), .threads = kPartThreads, .overlap_launch = overlap}, context,
           args, static_cast<int>(parts));
    launch(what, draw_kernel<T>,
           Grid{.blocks = static_cast<unsigned>(args.rows),
                .threads = kThreads,
                .smem_bytes = kSmemBytes,
                .overlap_launch = overlap},
           context, args, static_cast<int>(parts));
  });
}

}  // namespace fastpeft::cuda
