// The tile kernel's launchers: files of their own, as its instances take a while to compile.
#pragma once

#include "cuda/nf4_linear_tiles_plan.h"
#include "fastpeft/nf4_linear.h"

namespace fastpeft::cuda {

// On a device of compute capability 9.0; sizes and alignment as nf4_linear_plan has checked them.
void nf4_linear_tiles(const NF4LinearArgs& args, const nf4_tiles::Plan& plan, const Context& context);

// The same where args.adapter is set.
void nf4_linear_tiles_adapter(const NF4LinearArgs& args, const nf4_tiles::Plan& plan, const Context& context);

// What is made beside the product of a plan with `beside_blocks`; the product is to be launched next.
void lora_beside_product(const NF4LinearArgs& args, const nf4_tiles::Plan& plan, const Context& context);

// The same for plans with `fragments`.
void nf4_linear_fragments(const NF4LinearArgs& args, const nf4_tiles::Plan& plan, const Context& context);

}  // namespace fastpeft::cuda
