// Products of tokens sorted by expert on CUDA: a launch that lists what there is to do, and the tile kernel.
//
// Plan     The host knows neither which experts have tokens nor how many. A thread block turns the ends of the experts'
//          tokens into a list of columns, a thread an expert; the tile kernel walks it (nf4_linear_tiles_experts.cuh).
//          So nothing waits, and both launches can be captured and replayed with other numbers.
// Limits   Hopper; other devices multiply one expert after the other (ops/nf4_experts.py).
#include "fastpeft/nf4_experts.h"

#include "common/nf4_checks.h"
#include "cuda/nf4_experts_config.h"
#include "cuda/nf4_linear_tiles_launch.cuh"

namespace fastpeft::cuda {
namespace {

constexpr int kWarps = kMostExperts / 32;

__device__ int sum_before_in_warp(int value, int& all) {
  int sum = value;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(0xffffffff, sum, step);
    if (static_cast<int>(threadIdx.x % 32) >= step) sum += other;
  }
  all = __shfl_sync(0xffffffff, sum, 31);
  return sum - value;
}

__global__ void __launch_bounds__(kMostExperts, 1)
    list_columns(const int* ends, int experts, int n, int width, int4* columns, int* how_many) {
  wait_for_kernel_before();
  let_next_kernel_start();
  __shared__ int of_warp[kWarps];
  const int expert = static_cast<int>(threadIdx.x), warp = expert / 32, lane = expert % 32;
  const int end = expert < experts ? ends[expert] : 0, begin = 0 < expert && expert < experts ? ends[expert - 1] : 0;
  const int own = (end - begin + width - 1) / width;
  int all;
  int first = sum_before_in_warp(own, all);
  if (lane == 0) of_warp[warp] = all;
  __syncthreads();
  if (warp == 0) {
    const int before = sum_before_in_warp(of_warp[lane], all);
    of_warp[lane] = before;
    if (lane == 0) *how_many = all;
  }
  __syncthreads();
  first += of_warp[warp];
  // A warp writes the columns of its experts one expert after the other.
  for (int i = 0; i < 32; ++i) {
    const int count = __shfl_sync(0xffffffff, own, i), to = __shfl_sync(0xffffffff, first, i);
    const int from = __shfl_sync(0xffffffff, begin, i), until = __shfl_sync(0xffffffff, end, i);
    for (int c = lane; c < count; c += 32) columns[to + c] = make_int4((warp * 32 + i) * n, from + c * width, until, 0);
  }
}
static_assert(kWarps == 32);

template <typename T, bool kBackward>
void choose_tile(const NF4LinearArgs& args, const nf4_tiles::Plan& tiles, const nf4_tiles::Experts& experts,
                 const Context& context) {
  switch (tiles.tokens + tiles.cluster) {
    case 64 + 1: return nf4_tiles::launch_kernel<T, kBackward, 64, 1, false, true>(args, tiles, context, experts);
    case 128 + 1: return nf4_tiles::launch_kernel<T, kBackward, 128, 1, false, true>(args, tiles, context, experts);
    default: return nf4_tiles::launch_kernel<T, kBackward, 256, 2, false, true>(args, tiles, context, experts);
  }
}

template <typename T>
void choose_direction(const NF4LinearArgs& args, const nf4_tiles::Plan& tiles, const nf4_tiles::Experts& experts,
                      const Context& context) {
  return args.transposed ? choose_tile<T, true>(args, tiles, experts, context)
                         : choose_tile<T, false>(args, tiles, experts, context);
}

}  // namespace

void nf4_linear_experts(const NF4ExpertsArgs& args, const Context& context) {
  check_block_size("nf4_linear_experts", args.w.block_size);
  check(args.w.numel == args.experts * args.n * args.k, "nf4_linear_experts: the weight has ", args.w.numel,
        " elements; experts x n x k is ", args.experts, " x ", args.n, " x ", args.k);
  const DeviceLimits limits = device_limits();
  const bool aligned = is_aligned(args.x) && is_aligned(args.y) && is_aligned(args.w.codes);
  const NF4ExpertsPlan plan = nf4_experts_plan(
      {args.m, args.experts, args.n, args.k, args.transposed, args.w.block_size, args.dtype, aligned}, limits);
  check(plan.fused, "nf4_linear_experts: no kernel for m = ", args.m, ", ", args.experts, " experts, n = ", args.n,
        ", k = ", args.k, " (", plan.reason, ")");
  check(args.workspace_bytes >= plan.workspace_bytes, "nf4_linear_experts: the workspace has ", args.workspace_bytes,
        " bytes; ", plan.reason, " needs ", plan.workspace_bytes);

  const int m = static_cast<int>(args.m), n = static_cast<int>(args.n), k = static_cast<int>(args.k);
  const nf4_tiles::Plan tiles = nf4_tiles::plan_for(m, args.transposed ? k : n, args.transposed ? n : k, limits.sms,
                                                    plan.tokens, plan.cluster, false);
  int* how_many = static_cast<int*>(args.workspace);
  int4* columns = static_cast<int4*>(args.workspace) + 1;
  launch([&] { return concat("nf4_linear_experts of m = ", args.m, ", ", args.experts, " experts"); }, list_columns,
         Grid{.blocks = 1, .threads = kMostExperts, .overlap_launch = true}, context, args.ends,
         static_cast<int>(args.experts), n, plan.tokens * plan.cluster, columns, how_many);

  nf4_tiles::Experts experts{};
  experts.count = static_cast<int>(args.experts);
  experts.columns = columns, experts.how_many = how_many;
  experts.strips = tiles.strips, experts.seats = tiles.seats, experts.chunks = tiles.chunks;
  experts.blocks = static_cast<int>(std::min<int64_t>(tiles.seats, plan.columns * tiles.strips)) * tiles.cluster;
  experts.by_strips = nf4_tiles::divisor(tiles.strips);
  NF4LinearArgs product{};
  product.w = args.w, product.transposed = args.transposed, product.x = args.x, product.y = args.y;
  product.dtype = args.dtype, product.m = args.m, product.n = args.n, product.k = args.k;
  args.dtype == DType::kBFloat16 ? choose_direction<BFloat16>(product, tiles, experts, context)
                                 : choose_direction<Float16>(product, tiles, experts, context);
}

}  // namespace fastpeft::cuda
