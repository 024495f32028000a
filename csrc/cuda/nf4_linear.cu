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

template <typename T, int kTiles, nf4_decode::ScaleSource kScales, int kWarps>
void launch_decode(const NF4LinearArgs& args, const NF4LinearPlan& plan, const Context& context) {
  const NF4DecodeProblem problem = nf4_decode_problem(args.w, args.x, args.bias, args.y, static_cast<int>(args.m),
                                                      static_cast<int>(args.n), static_cast<int>(args.k), plan.decode);
  launch([&] { return concat("nf4_linear of m = ", args.m, ", n = ", args.n, ", k = ", args.k, ", ", plan.reason); },
         nf4_decode::kernel<T, kTiles, kScales, kWarps>,
         Grid{.blocks = static_cast<unsigned>(plan.decode.blocks),
              .threads = 32 * kWarps,
              .smem_bytes = static_cast<unsigned>(plan.decode.smem_bytes),
              .overlap_launch = device_limits().wgmma},
         context, problem);
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
  if (plan.decode.staged) return choose_tiles<T, ScaleSource::kStaged>(args, plan, context);
  return args.w.nested_absmax != nullptr ? choose_tiles<T, ScaleSource::kNested>(args, plan, context)
                                         : choose_tiles<T, ScaleSource::kFloat>(args, plan, context);
}

}  // namespace

void nf4_linear(const NF4LinearArgs& args, const Context& context) {
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
