// The mma kernel's launcher: a file of its own, as its instances take a while to compile.
#pragma once

#include "fastpeft/nf4_linear.h"

namespace fastpeft::cuda {

// On compute capability 8.0 or later; sizes as nf4_linear_plan has checked them.
void nf4_linear_mma(const NF4LinearArgs& args, const Context& context);

}  // namespace fastpeft::cuda
