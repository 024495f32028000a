// What a mixture of experts needs beside its products, on CUDA: rows sorted by expert, spread and collected.
//
// Rows     Spread, collect and dots move rows and little else; every row is read and written once. A block has a token,
//          or columns of it: neighbouring threads have neighbouring packs of 16 bytes.
//          spread: a thread holds a pack of x and stores it top_k times.
//          collect: a thread asks for a pack of each of up to 8 rows before it needs the first, and sums in registers,
//          in the order of k; nothing is summed by atomics, so equal calls give equal bits.
//          dots: a block has a token and goes along its columns, 8 dots at a time, so that x is read once for 8 rows;
//          lanes, then warps, meet in a fixed order.
//          Loads carry no hint, as those of glu.cu. Without a number of blocks to aim at, the assembler takes too few
//          registers and puts the loads of a thread one behind the other.
// Route    One block, as a second one could begin only once all ids are counted: two launches, or words that somebody
//          has zeroed. A warp has a part of the ids, in order, and counts of its own in shared memory: no two warps
//          meet at a counter. The counts are summed over the warps before, then over the experts before; then each warp
//          goes through its part again and gives out places. Lanes find those with the same expert by ballots over the
//          bits of its number, 8 for 128 experts, and not by counters, where 32 lanes of one expert would queue. So the
//          time does not depend on how the experts are loaded, and the sort is stable: a pair's place is a function of
//          the ids alone.
//          For few ids, as decoding has them, it is a load, a count, a scan and a store, a handful of barriers apart.
//          For many it is bound by the one multiprocessor's instructions, about 85 for 32 ids.
// Limits   Packs need rows of whole packs and tensors at 16-byte boundaries; the same kernels with packs of one element
//          take the rest. At most 1024 experts, a thread of the scan each; fewer parts from 310 experts on, as the
//          counts fit 40 KB.
#include "fastpeft/experts.h"

#include <algorithm>
#include <initializer_list>
#include <string>
#include <type_traits>

#include "common/integer.h"
#include "cuda/device/launch.cuh"
#include "cuda/device/numbers.cuh"
#include "cuda/device/ptx.cuh"

namespace fastpeft::cuda {
namespace {

// --- route -----------------------------------------------------------------------------------------------------------

constexpr int kMostParts = 32;
constexpr int kAhead = 4;  // ids that a lane asks for before it needs the first
constexpr int kFewBits = 8, kMostBits = 11;
constexpr int64_t kCountBytes = 40 * 1024;
static_assert(4 * 3 * (kMostRoutedExperts + 1) <= kCountBytes, "two parts and the sums fit");
static_assert(kMostRoutedExperts < 1 << kMostBits);

// How the ids lie over warps: equal for all, so that no branch parts a warp's lanes.
struct Parts {
  int parts;  // warps that have ids; there may be more
  int steps;  // of 32 ids, of a part
};

// Inclusive, over the lanes of a warp.
__device__ int sum_up_to_lane(int value, int lane) {
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const int below = __shfl_up_sync(~0u, value, offset);
    if (lane >= offset) value += below;
  }
  return value;
}

// Lanes of `among` with the same key, which is below 2^kBits.
template <int kBits>
__device__ unsigned peers_of(int key, unsigned among) {
#pragma unroll
  for (int bit = 0; bit < kBits; ++bit) {
    const int mine = static_cast<int>(static_cast<unsigned>(key) << (31 - bit)) >> 31;  // the bit, everywhere
    among &= ~(__ballot_sync(~0u, mine < 0) ^ mine);
  }
  return among;
}

template <int kBits>
__global__ void __launch_bounds__(32 * kMostParts)
    route_kernel(const __grid_constant__ ExpertsRouteArgs args, const __grid_constant__ Parts split) {
  extern __shared__ int shared[];
  __shared__ int warp_sums[32];
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int warp = thread / 32, lane = thread % 32;
  const int experts = static_cast<int>(args.experts), columns = experts + 1;  // the last: ids that are no expert's
  int* starts = shared;                                                       // [columns]
  int* part_counts = shared + columns;                                        // [parts, columns]
  int* counts = part_counts + warp * columns;
#pragma unroll 1
  for (int i = thread; i < split.parts * columns; i += threads) part_counts[i] = 0;
  let_next_kernel_start();
  wait_for_kernel_before();
  __syncthreads();

  const unsigned count = static_cast<unsigned>(args.count), part = 32 * static_cast<unsigned>(split.steps);
  const unsigned first = warp < split.parts ? warp * part : count, end = min(count, first + part);
  const auto each_step = [&](const auto& body) {
#pragma unroll 1
    for (int step = 0; step < split.steps; step += kAhead) {
      int64_t ids[kAhead];
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        const unsigned i = first + 32 * (step + j) + lane;
        ids[j] = i < end ? args.ids[i] : -1;
      }
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        if (step + j == split.steps) break;
        const int key =
            static_cast<uint64_t>(ids[j]) < static_cast<uint64_t>(experts) ? static_cast<int>(ids[j]) : experts;
        const unsigned i = first + 32 * (step + j) + lane;
        body(i, key, i < end);
      }
    }
  };
  each_step([&](unsigned, int key, bool inside) {
    if (inside) atomicAdd(&counts[key], 1);
  });
  __syncthreads();

  constexpr int kTogether = 8;
#pragma unroll 1
  for (int column = thread; column < columns; column += threads) {
    int sum = 0;
#pragma unroll 1
    for (int group = 0; group < split.parts; group += kTogether) {
      int* of_part = part_counts + group * columns + column;
      int found[kTogether];
#pragma unroll
      for (int i = 0; i < kTogether; ++i) found[i] = group + i < split.parts ? of_part[i * columns] : 0;
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        if (group + i < split.parts) of_part[i * columns] = sum;
        sum += found[i];
      }
    }
    starts[column] = sum;
  }
  __syncthreads();
  const int rows = thread < experts ? starts[thread] : 0;
  const int up_to_lane = sum_up_to_lane(rows, lane);
  if (lane == 31) warp_sums[warp] = up_to_lane;
  __syncthreads();
  const int end_row = up_to_lane + __reduce_add_sync(~0u, lane < warp ? warp_sums[lane] : 0);
  if (thread < experts) {
    starts[thread] = end_row - rows;
    args.ends[thread] = end_row;
  }
  if (thread == experts - 1) starts[experts] = end_row;
  __syncthreads();

  each_step([&](unsigned i, int key, bool inside) {
    const unsigned peers = peers_of<kBits>(key, __ballot_sync(~0u, inside));
    const unsigned before = peers & ((1u << lane) - 1);
    const int counted = inside ? counts[key] : 0;
    __syncwarp();
    if (inside) {
      args.place[i] = starts[key] + counted + __popc(before);
      if (before == 0) counts[key] = counted + __popc(peers);
    }
    __syncwarp();
  });
}

// --- rows ------------------------------------------------------------------------------------------------------------

constexpr int kThreads = 256;
constexpr int kDotThreads = 128;
constexpr int kMostAtOnce = 8;                     // rows of a token
constexpr int kCollectBlocks = 3, kDotBlocks = 6;  // of a multiprocessor

template <typename T, int kN>
__device__ Pack<T, kN> load(bool wanted, const T* from) {
  if constexpr (kN == 1) {
    return {wanted ? *from : T{}};
  } else {
    return load_pack_if<T, kN>(wanted, from);
  }
}

template <typename T, int kN>
__device__ void store(bool wanted, T* to, const Pack<T, kN>& pack) {
  if constexpr (kN > 1) {
    store_pack_if(wanted, to, pack);
  } else if (wanted) {
    *to = pack.values[0];
  }
}

// Where kAtOnce rows of a token are, from its k-th on. The loads that give them are under way together.
template <int kAtOnce>
struct RowsOfToken {
  int row[kAtOnce];

  __device__ RowsOfToken(const PlacedRows& rows, int64_t token, int k) {
    const int top_k = static_cast<int>(rows.top_k);
    const int32_t* place = rows.place + token * top_k + k;
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) row[i] = k + i < top_k ? place[i] : -1;
    const unsigned all = static_cast<unsigned>(rows.tokens * top_k);
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) row[i] = static_cast<unsigned>(row[i]) < all ? row[i] : -1;
  }

  __device__ bool has(int i) const { return row[i] >= 0; }
};

template <int kAtOnce>
struct WeightsOfToken {
  float weight[kAtOnce];

  __device__ WeightsOfToken(const float* weights, const PlacedRows& rows, int64_t token, int k) {
    const int top_k = static_cast<int>(rows.top_k);
    const float* from = weights + token * top_k + k;
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) weight[i] = weights != nullptr && k + i < top_k ? from[i] : 1.0f;
  }
};

// The token of a block, and the first column of a thread's pack.
struct Spot {
  int64_t token, column;
  bool inside;

  __device__ Spot(unsigned blocks_per_token, int each, int64_t width) {
    token = blockIdx.x / blocks_per_token;
    column = (static_cast<int64_t>(blockIdx.x % blocks_per_token) * blockDim.x + threadIdx.x) * each;
    inside = column < width;
  }
};

template <typename T, int kN>
__global__ void __launch_bounds__(kThreads)
    spread_kernel(const __grid_constant__ ExpertsSpreadArgs args, unsigned blocks_per_token) {
  let_next_kernel_start();
  wait_for_kernel_before();
  const PlacedRows& rows = args.rows;
  const Spot spot(blocks_per_token, kN, rows.width);
  auto x = load<T, kN>(spot.inside, static_cast<const T*>(args.x) + spot.token * rows.width + spot.column);
  T* out = static_cast<T*>(args.out) + spot.column;
  for (int k = 0; k < rows.top_k; k += kMostAtOnce) {
    const RowsOfToken<kMostAtOnce> places(rows, spot.token, k);
    if (args.weights == nullptr) {
#pragma unroll
      for (int i = 0; i < kMostAtOnce; ++i) {
        store(spot.inside && places.has(i), out + places.row[i] * rows.width, x);
      }
      continue;
    }
    const WeightsOfToken<kMostAtOnce> weights(args.weights, rows, spot.token, k);
#pragma unroll
    for (int i = 0; i < kMostAtOnce; ++i) {
      Pack<T, kN> scaled;
      if constexpr (kN > 1) keep_packed(x);
#pragma unroll
      for (int j = 0; j < kN; ++j) scaled.values[j] = from_float<T>(weights.weight[i] * to_float(x.values[j]));
      store(spot.inside && places.has(i), out + places.row[i] * rows.width, scaled);
    }
  }
}

template <typename T, int kN, int kAtOnce>
__global__ void __launch_bounds__(kThreads, kCollectBlocks)
    collect_kernel(const __grid_constant__ ExpertsCollectArgs args, unsigned blocks_per_token) {
  let_next_kernel_start();
  wait_for_kernel_before();
  const PlacedRows& rows = args.rows;
  const Spot spot(blocks_per_token, kN, rows.width);
  const T* y = static_cast<const T*>(args.y) + spot.column;
  float sums[kN] = {};
  for (int k = 0; k < rows.top_k; k += kAtOnce) {
    const RowsOfToken<kAtOnce> places(rows, spot.token, k);
    const WeightsOfToken<kAtOnce> weights(args.weights, rows, spot.token, k);
    Pack<T, kN> packs[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      packs[i] = load<T, kN>(spot.inside && places.has(i), y + places.row[i] * rows.width);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
#pragma unroll
      for (int j = 0; j < kN; ++j) sums[j] = fmaf(weights.weight[i], to_float(packs[i].values[j]), sums[j]);
    }
  }
  Pack<T, kN> out;
#pragma unroll
  for (int j = 0; j < kN; ++j) out.values[j] = from_float<T>(sums[j]);
  store(spot.inside, static_cast<T*>(args.out) + spot.token * rows.width + spot.column, out);
}

template <typename T, int kN, int kAtOnce>
__global__ void __launch_bounds__(kDotThreads, kDotBlocks) dots_kernel(const __grid_constant__ ExpertsDotsArgs args) {
  __shared__ float warp_sums[kDotThreads / 32][kAtOnce];
  const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
  let_next_kernel_start();
  wait_for_kernel_before();
  const PlacedRows& rows = args.rows;
  const int64_t token = blockIdx.x;
  const T *x = static_cast<const T*>(args.x) + token * rows.width, *y = static_cast<const T*>(args.y);
  for (int k = 0; k < rows.top_k; k += kAtOnce) {
    const RowsOfToken<kAtOnce> places(rows, token, k);
    float sums[kAtOnce] = {};
    for (int64_t column = static_cast<int64_t>(threadIdx.x) * kN; column < rows.width; column += kDotThreads * kN) {
      auto of_x = load<T, kN>(true, x + column);
      Pack<T, kN> packs[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        packs[i] = load<T, kN>(places.has(i), y + places.row[i] * rows.width + column);
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if constexpr (kN > 1) keep_packed(of_x);
#pragma unroll
        for (int j = 0; j < kN; ++j) sums[i] = fmaf(to_float(of_x.values[j]), to_float(packs[i].values[j]), sums[i]);
      }
    }
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) sums[i] += __shfl_xor_sync(~0u, sums[i], offset);
    }
    if (lane == 0) {
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) warp_sums[warp][i] = sums[i];
    }
    __syncthreads();
    const int mine = static_cast<int>(threadIdx.x);
    if (mine < kAtOnce && k + mine < rows.top_k) {
      float sum = 0.0f;
#pragma unroll
      for (int w = 0; w < kDotThreads / 32; ++w) sum += warp_sums[w][mine];
      args.dots[token * rows.top_k + k + mine] = sum;
    }
    __syncthreads();
  }
}

// --- launchers -------------------------------------------------------------------------------------------------------

std::string described(const char* function, const PlacedRows& rows) {
  return concat(function, " of ", rows.tokens, " tokens of ", rows.width, " in ", rows.top_k, " rows each");
}

void check_rows(const char* function, const PlacedRows& rows) {
  check(rows.tokens >= 0 && rows.top_k >= 1 && rows.width >= 1, function, ": got ", rows.tokens, " tokens of ",
        rows.width, " in ", rows.top_k, " rows each; the last two must be at least 1");
  check(rows.top_k <= INT32_MAX && rows.tokens <= INT32_MAX / rows.top_k, function, ": ", rows.tokens, " tokens in ",
        rows.top_k, " rows each are too many; at most 2^31 - 1 rows are supported");
}

template <typename T>
bool fits_packs(const PlacedRows& rows, std::initializer_list<const void*> tensors) {
  return rows.width % (16 / sizeof(T)) == 0 && std::all_of(tensors.begin(), tensors.end(), is_aligned);
}

// Calls body with the rows of a token that a kernel has under way together, as a constant.
template <typename Body>
void dispatch_at_once(int64_t top_k, const Body& body) {
  if (top_k == 1) return body(std::integral_constant<int, 1>{});
  if (top_k == 2) return body(std::integral_constant<int, 2>{});
  if (top_k <= 4) return body(std::integral_constant<int, 4>{});
  body(std::integral_constant<int, kMostAtOnce>{});
}

template <typename Args>
void launch_columns(const char* function, void (*kernel)(Args, unsigned), const Args& args, int64_t each,
                    const Context& context) {
  const PlacedRows& rows = args.rows;
  const int64_t packs = ceil_div(rows.width, each), blocks_per_token = ceil_div(packs, kThreads);
  check(rows.tokens == 0 || blocks_per_token <= INT32_MAX / rows.tokens, function, ": ", rows.tokens, " tokens of ",
        rows.width, " elements are too many for one call");
  // No more threads than a token's blocks need, so that few are idle in its last one.
  const int64_t threads = ceil_div(ceil_div(packs, blocks_per_token), 32) * 32;
  launch([&] { return described(function, rows); }, kernel,
         Grid{.blocks = static_cast<unsigned>(rows.tokens * blocks_per_token),
              .threads = static_cast<unsigned>(threads),
              .overlap_launch = device_limits().wgmma},
         context, args, static_cast<unsigned>(blocks_per_token));
}

}  // namespace

void experts_route(const ExpertsRouteArgs& args, const Context& context) {
  check(args.experts >= 1 && args.experts <= kMostRoutedExperts, "experts_route: got ", args.experts,
        " experts; needs 1 to ", kMostRoutedExperts);
  check(args.count >= 0 && args.count <= INT32_MAX, "experts_route: got ", args.count,
        " ids; at most 2^31 - 1 are supported");
  const int64_t count_bytes = sizeof(int) * (args.experts + 1), most_parts = kCountBytes / count_bytes - 1;
  const int64_t steps_of_all = ceil_div(args.count, 32);
  const int64_t steps = std::max<int64_t>(1, ceil_div(steps_of_all, std::min<int64_t>(kMostParts, most_parts)));
  const Parts split{static_cast<int>(std::max<int64_t>(1, ceil_div(steps_of_all, steps))), static_cast<int>(steps)};
  launch([&] { return concat("experts_route of ", args.count, " ids of ", args.experts, " experts"); },
         args.experts < 1 << kFewBits ? route_kernel<kFewBits> : route_kernel<kMostBits>,
         Grid{.blocks = 1,
              .threads = static_cast<unsigned>(32 * std::max<int64_t>(split.parts, ceil_div(args.experts, 32))),
              .smem_bytes = static_cast<unsigned>(count_bytes * (split.parts + 1)),
              .overlap_launch = device_limits().wgmma},
         context, args, split);
}

void experts_spread(const ExpertsSpreadArgs& args, const Context& context) {
  check_rows("experts_spread", args.rows);
  dispatch("experts_spread", args.rows.dtype, [&](auto zero) {
    using T = decltype(zero);
    constexpr int kN = 16 / static_cast<int>(sizeof(T));
    if (fits_packs<T>(args.rows, {args.x, args.out})) {
      launch_columns("experts_spread", spread_kernel<T, kN>, args, kN, context);
    } else {
      launch_columns("experts_spread", spread_kernel<T, 1>, args, 1, context);
    }
  });
}

void experts_collect(const ExpertsCollectArgs& args, const Context& context) {
  check_rows("experts_collect", args.rows);
  dispatch("experts_collect", args.rows.dtype, [&](auto zero) {
    using T = decltype(zero);
    constexpr int kN = 16 / static_cast<int>(sizeof(T));
    if (!fits_packs<T>(args.rows, {args.y, args.out})) {
      return launch_columns("experts_collect", collect_kernel<T, 1, kMostAtOnce>, args, 1, context);
    }
    dispatch_at_once(args.rows.top_k, [&](auto at_once) {
      launch_columns("experts_collect", collect_kernel<T, kN, decltype(at_once)::value>, args, kN, context);
    });
  });
}

void experts_dots(const ExpertsDotsArgs& args, const Context& context) {
  check_rows("experts_dots", args.rows);
  const auto run = [&](void (*kernel)(ExpertsDotsArgs)) {
    launch([&] { return described("experts_dots", args.rows); }, kernel,
           Grid{.blocks = static_cast<unsigned>(args.rows.tokens),
                .threads = kDotThreads,
                .overlap_launch = device_limits().wgmma},
           context, args);
  };
  dispatch("experts_dots", args.rows.dtype, [&](auto zero) {
    using T = decltype(zero);
    constexpr int kN = 16 / static_cast<int>(sizeof(T));
    if (!fits_packs<T>(args.rows, {args.x, args.y})) return run(dots_kernel<T, 1, kMostAtOnce>);
    dispatch_at_once(args.rows.top_k, [&](auto at_once) { run(dots_kernel<T, kN, decltype(at_once)::value>); });
  });
}

}  // namespace fastpeft::cuda
