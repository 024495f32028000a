// Dropout whose mask is a function of (seed, row, column), so that backward makes it again instead of storing it.
//
// out[i, j] = keep(i, j) ? x[i, j] / (1 - t / 32768) : 0, where t = p * 32768, rounded, so that the expectation is x.
// The mask is the same on every device and for every dtype.
//
// keep(i, j) = v >= t for 15 random bits v. A call of the generator, philox4x32-7(counter = (column call, row call, 0,
// 0), key = seed), serves sixteen elements, two columns of eight rows:
//     column call  j / 2
//     row call     i / 32 * 4 + i % 8 / 2,   shared by rows i, i + 1, i + 8 and i + 9, and those sixteen further
//     word         i % 16 / 8 * 2 + i % 2,   turned right by a byte for the upper sixteen of 32 rows
//     half         lower or upper by j % 2, of it the lower 15 bits.
// A turned word shares a byte with the word as it was: the high one of either is the low one of another. So two
// elements of a column that are sixteen rows apart, or the neighbouring column's, are correlated, by 0.0009 at p = 0.05
// and never above 0.004; p itself stays exact to 2^-16. The layout suits the tensor cores: a lane holds neighbouring
// columns as operand, and those rows as operand and as sum, so that a product can draw the mask where it needs it.
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
