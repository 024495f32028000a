// Launches lora_beside_kernel.cuh, and checks what it is given.
#include "cuda/lora_beside_kernel.cuh"

#include <algorithm>

#include "cuda/device/launch.cuh"
#include "cuda/device/tensor_map.cuh"
#include "cuda/nf4_linear_tiles.h"

namespace fastpeft::cuda {
namespace {

using nf4_tiles::rank_class;
static_assert(lora_beside::kTokens == nf4_tiles::kReadyTokens);

CUtensorMapSwizzle swizzle_of(int ranks) {
  return ranks == 64 ? CU_TENSOR_MAP_SWIZZLE_128B : ranks == 32 ? CU_TENSOR_MAP_SWIZZLE_64B : CU_TENSOR_MAP_SWIZZLE_32B;
}

// A matrix [m, ranks], its ranks filled up to what the kernel takes.
CUtensorMap rank_map(const NF4LinearArgs& args, const void* data, int64_t ranks, int64_t pitch, int kernel_ranks) {
  return tensor_map(map_type(args.dtype), 2, swizzle_of(kernel_ranks), data, static_cast<int>(args.m),
                    static_cast<int>(ranks), lora_beside::kTokens, kernel_ranks, static_cast<int>(pitch));
}

lora_beside::Problem make_problem(const NF4LinearArgs& args, const nf4_tiles::Plan& plan) {
  const NF4LinearBeside& from = args.adapter.beside;
  const int ranks = static_cast<int>(from.ranks), all = static_cast<int>(from.gradient_ranks);
  lora_beside::Problem p{};
  p.m = plan.m, p.depth = plan.depth;
  p.total = args.transposed ? all : ranks, p.r = plan.makes ? ranks : 0;
  p.made = const_cast<void*>(args.adapter.xa), p.pitch = static_cast<int>(args.adapter.xa_pitch);
  p.scale = static_cast<float>(args.transposed ? from.adapters[0].scale : 1.0);
  int64_t first = 0;
  for (int i = 0; i < kMostAdapters; ++i) {
    const int64_t r = args.transposed ? from.da_r[i] : from.adapters[i].r;
    p.factor[i] = args.transposed ? from.adapters[i].b : from.adapters[i].a;
    p.da[i] = from.da[i];
    p.first[i] = r > 0 ? static_cast<int>(first) : 1 << 30;
    first += r;
  }
  p.ready = args.counters + nf4_tiles::product_counters(plan);
  p.blocks_done = p.ready + nf4_tiles::beside_counters(plan) - 4;
  if (plan.makes) {
    p.rounded = from.rounded;
    p.map_rounded = args.transposed ? tensor_map(map_type(args.dtype), 2, swizzle_of(rank_class(ranks)), from.rounded,
                                                 plan.depth, ranks, lora_beside::kColumns, rank_class(ranks))
                                    : activation_map(args.dtype, from.rounded, ranks, plan.depth, rank_class(ranks));
    if (args.transposed) p.xa = rank_map(args, from.xa, ranks, from.xa_pitch, rank_class(ranks));
    p.db = from.db, p.db_sums = from.db_sums;
  }
  p.k = plan.makes_gradient ? plan.out : 0;
  if (plan.makes_gradient) {
    p.dxa = rank_map(args, from.dxa, all, all, rank_class(all));
    p.x = activation_map(args.dtype, from.x, plan.m, plan.out, lora_beside::kTokens);
  }
  return p;
}

template <typename T, bool kBackward, int kRank, int kGradientRank>
void launch_kernel(const NF4LinearArgs& args, const nf4_tiles::Plan& plan, const Context& context) {
  using lora_beside::Layout;
  launch([&] { return concat("lora_beside of m = ", args.m, ", n = ", args.n, ", k = ", args.k, ", rank ", kRank); },
         lora_beside::kernel<T, kBackward, kRank, kGradientRank>,
         Grid{.blocks = static_cast<unsigned>(plan.beside_blocks),
              .threads = lora_beside::threads(kBackward),
              .smem_bytes = std::max(Layout<kRank>::kBytes, Layout<kGradientRank>::kBytes),
              .cluster = 2,  // so that those of the product, of two as well, find room on all that is left
              .overlap_launch = true},
         context, activation_map(args.dtype, args.x, plan.m, plan.depth, lora_beside::kTokens),
         make_problem(args, plan));
}

template <typename T>
void choose(const NF4LinearArgs& args, const nf4_tiles::Plan& plan, const Context& context) {
  const NF4LinearBeside& beside = args.adapter.beside;
  const int all = plan.makes_gradient ? rank_class(static_cast<int>(beside.gradient_ranks)) : 16;
  const int ranks = plan.makes ? rank_class(static_cast<int>(beside.ranks)) : all;
  if (!args.transposed) {
    switch (ranks) {
      case 16: return launch_kernel<T, false, 16, 16>(args, plan, context);
      case 32: return launch_kernel<T, false, 32, 32>(args, plan, context);
      default: return launch_kernel<T, false, 64, 64>(args, plan, context);
    }
  }
  switch (100 * ranks + (plan.makes_gradient ? all : ranks)) {
    case 1616: return launch_kernel<T, true, 16, 16>(args, plan, context);
    case 1632: return launch_kernel<T, true, 16, 32>(args, plan, context);
    case 1664: return launch_kernel<T, true, 16, 64>(args, plan, context);
    case 3232: return launch_kernel<T, true, 32, 32>(args, plan, context);
    case 3264: return launch_kernel<T, true, 32, 64>(args, plan, context);
    default: return launch_kernel<T, true, 64, 64>(args, plan, context);
  }
}

}  // namespace

void lora_beside_product(const NF4LinearArgs& args, const nf4_tiles::Plan& plan, const Context& context) {
  const NF4LinearBeside& beside = args.adapter.beside;
  for (const LoraAdapter& adapter : beside.adapters) {
    check(adapter.r % 8 == 0 && is_aligned(adapter.a) && is_aligned(adapter.b), "lora_beside: an adapter of rank ",
          adapter.r, "; needs a multiple of 8, and matrices aligned to 16 bytes");
  }
  for (const int64_t r : beside.da_r) check(r % 8 == 0, "lora_beside: a gradient of rank ", r);
  check(is_aligned(beside.rounded), "lora_beside: no room for the rounded factor, or not aligned to 16 bytes");
  const int64_t most = std::max(beside.ranks, beside.gradient_ranks);
  check(most <= nf4_tiles::kMostBesideRanks && args.m <= nf4_tiles::kMostBesideTokens, "lora_beside: ", most,
        " ranks and ", args.m, " tokens; at most ", nf4_tiles::kMostBesideRanks, " and ", nf4_tiles::kMostBesideTokens);
  args.dtype == DType::kBFloat16 ? choose<BFloat16>(args, plan, context) : choose<Float16>(args, plan, context);
}

}  // namespace fastpeft::cuda
