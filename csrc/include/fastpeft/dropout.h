// Dropout whose mask is a function of (seed, element index), so that backward makes it again instead of storing it.
//
// out[i] = keep(i) ? x[i] / (1 - p) : 0, with keep(i) = philox4x32-10(counter = i / 4, key = seed)[i % 4] >= p * 2^32.
// The mask is the same on every device and for every dtype.
//
// Source   Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
#pragma once

#include "fastpeft/types.h"

namespace fastpeft {

struct DropoutArgs {
  const void* x;  // [numel], of `dtype`
  void* out;      // [numel], may be x
  DType dtype;    // float64 on the CPU only
  int64_t numel;
  double p;  // 0 <= p < 1
  uint64_t seed;
};

namespace cpu {
void dropout(const DropoutArgs& args, const Context& context);
}  // namespace cpu

namespace cuda {
void dropout(const DropoutArgs& args, const Context& context);
}  // namespace cuda

}  // namespace fastpeft
