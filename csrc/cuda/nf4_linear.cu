// Products with an NF4 weight on CUDA, straight from its codes.
//
// Plan     nf4_linear_config.h chooses; a kernel a regime. Nothing is allocated and nothing waits.
// Limits   What the plan says is to be dequantised is refused here: the caller has asked before.
#include "fastpeft/nf4_linear.h"

#include "cuda/device/launch.cuh"
#include "cuda/nf4_linear_config.h"
#include "cuda/nf4_linear_decode_kernel.cuh"

namespace fastpeft::cuda {
namespace {

template <typename T, int kTiles, bool kNested, int kWarps>
void launch_decode(const NF4LinearArgs& args, const NF4LinearPlan& plan, const Context& context) {
  int block_shift = 0;
  while ((int64_t{1} << block_shift) < args.w.block_size) ++block_shift;
  const NF4DecodeProblem problem{args.w,
                                 args.x,
                                 args.bias,
                                 args.y,
                                 static_cast<int>(args.m),
                                 static_cast<int>(args.n),
                                 static_cast<int>(args.k),
                                 block_shift};
  launch([&] { return concat("nf4_linear of m = ", args.m, ", n = ", args.n, ", k = ", args.k, ", ", plan.reason); },
         nf4_decode::kernel<T, kTiles, kNested, kWarps, nf4_decode::kStages>,
         Grid{static_cast<unsigned>(plan.blocks), 32 * kWarps, nf4_decode::smem_bytes(kTiles, kWarps)}, context,
         problem);
}

template <typename T, bool kNested>
void choose_tiles(const NF4LinearArgs& args, const NF4LinearPlan& plan, const Context& context) {
  if (plan.warps == 16) {
    return plan.tiles == 1 ? launch_decode<T, 1, kNested, 16>(args, plan, context)
                           : launch_decode<T, 2, kNested, 16>(args, plan, context);
  }
  return plan.tiles == 1 ? launch_decode<T, 1, kNested, 8>(args, plan, context)
                         : launch_decode<T, 2, kNested, 8>(args, plan, context);
}

template <typename T>
void choose_scales(const NF4LinearArgs& args, const NF4LinearPlan& plan, const Context& context) {
  return args.w.nested_absmax != nullptr ? choose_tiles<T, true>(args, plan, context)
                                         : choose_tiles<T, false>(args, plan, context);
}

}  // namespace

void nf4_linear(const NF4LinearArgs& args, const Context& context) {
  check_block_size("nf4_linear", args.w.block_size);
  check(args.w.numel == args.n * args.k, "nf4_linear: the weight has ", args.w.numel, " elements; n x k is ", args.n,
        " x ", args.k);
  const NF4LinearPlan plan = nf4_linear_plan(args.m, args.n, args.k, args.w.block_size, args.dtype,
                                             is_aligned(args.x) && is_aligned(args.w.codes), device_limits());
  check(plan.decode, "nf4_linear: no kernel for m = ", args.m, ", n = ", args.n, ", k = ", args.k, " (", plan.reason,
        "); decode the weight with nf4_dequantize and multiply");
  if (args.dtype == DType::kBFloat16) {
    choose_scales<BFloat16>(args, plan, context);
  } else {
    choose_scales<Float16>(args, plan, context);
  }
}

}  // namespace fastpeft::cuda
