// Launches nf4_linear_mma_kernel.cuh.
#include "cuda/nf4_linear_mma.h"

#include "cuda/nf4_linear_config.h"
#include "cuda/nf4_linear_mma_kernel.cuh"

namespace fastpeft::cuda {

static_assert(kMmaSmemBytes == nf4_mma::kSmemBytes, "the plan asks the device for what the kernel takes");

void nf4_linear_mma(const NF4LinearArgs& args, const Context& context) {
  args.dtype == DType::kBFloat16 ? nf4_mma::launch_mma<BFloat16>(args, context)
                                 : nf4_mma::launch_mma<Float16>(args, context);
}

}  // namespace fastpeft::cuda
