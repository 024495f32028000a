// Products with an NF4 weight on CUDA, straight from its codes.
//
// Plan     nf4_linear_config.h chooses; a kernel a regime. Nothing is allocated and nothing waits.
// Limits   What the plan says is to be dequantised is refused here: the caller has asked before.
#include "fastpeft/nf4_linear.h"

#include "cuda/device/launch.cuh"
#include "cuda/nf4_linear_config.h"
#include "cuda/nf4_linear_decode_kernel.cuh"
#include "cuda/nf4_linear_mma.h"
#include "cuda/nf4_linear_tiles.h"

namespace fastpeft::cuda {
namespace {

NF4LinearSizes nf4_linear_group_sizes(const NF4LinearArgs& args) {
  NF4LinearSizes sizes{args.m, args.n, args.k, false, 64, args.dtype, is_aligned(args.x), true};
  for (int i = 0; i < args.group.count; ++i) {
    const NF4View& w = args.group.w[i];
    check(w.numel == args.group.n[i] * args.k, "nf4_linear: weight ", i, " of several has ", w.numel,
          " elements; n x k is ", args.group.n[i], " x ", args.k);
    sizes.aligned &= is_aligned(w.codes);
    sizes.aligned_scales &= w.nested_absmax != nullptr && is_aligned(w.absmax) && w.block_size == 64;
    sizes.group[i] = args.group.n[i];
  }
  return sizes;
}

template <typename T, int kTiles, nf4_decode::ScaleSource kScales, int kWarps, int kCount = 1>
void launch_decode(const NF4LinearArgs& args, const NF4LinearPlan& plan, const Context& context) {
  NF4DecodeProblems<kCount> problems{};
  const auto n = static_cast<int>(args.n);
  if constexpr (kCount == 1) {
    problems.each[0] = nf4_decode_problem(args.w, args.x, args.bias, args.y, static_cast<int>(args.m), n,
                                          static_cast<int>(args.k), plan.decode.blocks, n, plan.decode);
    problems.each[0].add_to_y = args.add_to_y;
  } else {
    uint16_t* y = static_cast<uint16_t*>(args.y);
    for (int i = 0, block = 0; i < kCount; ++i) {
      const int own = static_cast<int>(args.group.n[i]), blocks = std::max(1, plan.decode.group_blocks[i]);
      problems.each[i] = nf4_decode_problem(args.group.w[i], args.x, nullptr, y, static_cast<int>(args.m), own,
                                            static_cast<int>(args.k), blocks, n, plan.decode);
      problems.first_block[i] = block;
      y += own, block += plan.decode.group_blocks[i];
    }
  }
  launch([&] { return concat("nf4_linear of m = ", args.m, ", n = ", args.n, ", k = ", args.k, ", ", plan.reason); },
         nf4_decode::kernel<T, kTiles, kScales, kWarps, kCount>,
         Grid{.blocks = static_cast<unsigned>(plan.decode.blocks),
              .threads = 32 * kWarps,
              .smem_bytes = static_cast<unsigned>(plan.decode.smem_bytes),
              .overlap_launch = device_limits().wgmma},
         context, problems);
}

template <typename T, nf4_decode::ScaleSource kScales>
void choose_tiles(const NF4LinearArgs& args, const NF4LinearPlan& plan, const Context& context) {
  if (plan.decode.warps == 16) {
    return plan.decode.tiles == 1 ? launch_decode<T, 1, kScales, 16>(args, plan, context)
                                  : launch_decode<T, 2, kScales, 16>(args, plan, context);
  }
  return plan.decode.tiles == 1 ? launch_decode<T, 1, kScales, 8>(args, plan, context)
                                : launch_decode<T, 2, kScales, 8>(args, plan, context);
}

template <typename T>
void choose_scales(const NF4LinearArgs& args, const NF4LinearPlan& plan, const Context& context) {
  using nf4_decode::ScaleSource;
  if (args.group.count > 0) {
    constexpr int kWarps = nf4_decode::kGroupWarps, kCount = kMostGroupedWeights;
    return plan.decode.tiles == 1 ? launch_decode<T, 1, ScaleSource::kStaged, kWarps, kCount>(args, plan, context)
                                  : launch_decode<T, 2, ScaleSource::kStaged, kWarps, kCount>(args, plan, context);
  }
  if (plan.decode.staged) return choose_tiles<T, ScaleSource::kStaged>(args, plan, context);
  return args.w.nested_absmax != nullptr ? choose_tiles<T, ScaleSource::kNested>(args, plan, context)
                                         : choose_tiles<T, ScaleSource::kFloat>(args, plan, context);
}

void nf4_linear_group(const NF4LinearArgs& args, const Context& context) {
  const NF4LinearPlan plan = nf4_linear_group_plan(nf4_linear_group_sizes(args), device_limits());
  check(args.workspace_bytes >= plan.workspace_bytes, "nf4_linear: the workspace has ", args.workspace_bytes,
        " bytes; several weights need ", plan.workspace_bytes);
  check(args.counters != nullptr || plan.counters == 0, "nf4_linear: several weights need counters");
  switch (plan.kernel) {
    case NF4LinearKernel::kDecode:
      return args.dtype == DType::kBFloat16 ? choose_scales<BFloat16>(args, plan, context)
                                            : choose_scales<Float16>(args, plan, context);
    case NF4LinearKernel::kFragments: return nf4_linear_fragments(args, plan.tiles, context);
    default: break;
  }
  throw ArgumentError(concat("nf4_linear: no kernel for ", args.group.count, " weights and m = ", args.m,
                             ", n = ", args.n, ", k = ", args.k, " together; multiply one by one"));
}

}  // namespace

void nf4_linear(const NF4LinearArgs& args, const Context& context) {
  if (args.group.count > 0) return nf4_linear_group(args, context);
  check_block_size("nf4_linear", args.w.block_size);
  check(args.w.numel == args.n * args.k, "nf4_linear: the weight has ", args.w.numel, " elements; n x k is ", args.n,
        " x ", args.k);
  DeviceLimits limits = device_limits();
  limits.wgmma = limits.wgmma && args.wgmma;
  const bool nested = args.w.nested_absmax != nullptr;
  const NF4LinearPlan plan = nf4_linear_plan(
      {args.m,
       args.n,
       args.k,
       args.transposed,
       args.w.block_size,
       args.dtype,
       is_aligned(args.x) && is_aligned(args.w.codes),
       nested && is_aligned(args.w.absmax),
       args.adapter.r,
       {static_cast<int>(args.adapter.beside.ranks), static_cast<int>(args.adapter.beside.gradient_ranks)}},
      limits);
  check(args.workspace_bytes >= plan.workspace_bytes, "nf4_linear: the workspace has ", args.workspace_bytes,
        " bytes; ", plan.reason, " needs ", plan.workspace_bytes);
  check(args.counters != nullptr || plan.counters == 0, "nf4_linear: ", plan.reason, " needs counters");
  check(!args.add_to_y || (plan.can_add && is_aligned(args.y)), "nf4_linear: cannot add to y: ", plan.reason);
  switch (plan.kernel) {
    case NF4LinearKernel::kDecode:
      return args.dtype == DType::kBFloat16 ? choose_scales<BFloat16>(args, plan, context)
                                            : choose_scales<Float16>(args, plan, context);
    case NF4LinearKernel::kFragments: return nf4_linear_fragments(args, plan.tiles, context);
    case NF4LinearKernel::kTiles: return nf4_linear_tiles(args, plan.tiles, context);
    case NF4LinearKernel::kMma: return nf4_linear_mma(args, context);
    case NF4LinearKernel::kDequantise: break;
  }
  throw ArgumentError(concat("nf4_linear: no kernel for m = ", args.m, ", n = ", args.n, ", k = ", args.k, " (",
                             plan.reason, "); decode the weight with nf4_dequantize and multiply"));
}

}  // namespace fastpeft::cuda
