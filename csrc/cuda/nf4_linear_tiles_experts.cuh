// What there is to do where tokens are sorted by expert, each expert with a weight of its own: the items of the tile
// kernel (nf4_linear_tiles_kernel.cuh), from a list on the device, because the host does not know how many tokens an
// expert has.
//
// Column   a unit's tokens, all of one expert; the last of an expert reads tokens of the next and stores none of them.
// Walk     all strips of a column, then the next column: x is read from memory once, an expert's codes stay in L2 while
//          its columns pass. Units are never divided: there are many.
#pragma once

#include <cuda_runtime.h>

#include "cuda/nf4_linear_tiles_plan.h"

namespace fastpeft::cuda::nf4_tiles {

struct Experts {
  int count;            // of experts
  const int4* columns;  // {first row of the expert's weight, first token, end of the expert's tokens, -}
  const int* how_many;
  int strips, seats, chunks, blocks;
  Divisor by_strips;
};

__device__ inline bool find_item(const Experts& p, int seat, int index, Item& item) {
  const int unit = index * p.seats + seat, column = p.by_strips.divide(unit);
  if (column >= __ldg(p.how_many)) return false;
  const int4 found = __ldg(p.columns + column);
  item.out0 = (unit - column * p.strips) * kTileOut, item.m0 = found.y;
  item.first_chunk = 0, item.chunks = p.chunks;
  item.parts = 1, item.part = 0, item.unit = 0, item.slot = 0, item.last_slot = 0;
  item.w_row = found.x, item.m_end = found.z;
  return true;
}

}  // namespace fastpeft::cuda::nf4_tiles
