// Dropout whose mask is a function of (seed, row, column), so that backward makes it again instead of storing it.
//
// out[i, j] = keep(i, j) ? x[i, j] / (1 - t / 32768) : 0, where t = p * 32768, rounded, so that the expectation is x.
// The mask is the same on every device and for every dtype.
//
// keep(i, j) = v >= t for 15 random bits v. A call of the generator, philox4x32-7(counter = (column call, row call, 0,
// 0), key = seed), serves eight elements, two columns of four rows:
//     column call  j / 16 * 8 + j % 8,       shared by columns j and j + 8 of sixteen
//     row call     i / 16 * 4 + i % 8 / 2,   shared by rows i, i + 1, i + 8 and i + 9 of sixteen, i even
//     word         j % 16 / 8 * 2 + i % 16 / 8, of it the lower or upper half by i % 2, of it the lower 15 bits.
// These are the eight that a thread holds next to each other both as operand and as sum of the tensor cores, so that a
// product can draw the mask where it needs it.
//
// Source   Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
#pragma once

#include "fastpeft/types.h"

namespace fastpeft {

struct DropoutArgs {
  const void* x;  // [rows, columns], of `dtype`, contiguous
  void* out;      // [rows, columns], may be x
  DType dtype;    // float64 on the CPU only
  int64_t rows, columns;
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
