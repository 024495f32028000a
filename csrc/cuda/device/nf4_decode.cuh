// NF4 codes to values of a 16-bit type, in registers: no table in memory, no bank conflicts.
//
// Plan     The sixteen products of level and scale are made and rounded once a block of weights (32 instructions); then
//          eight weights cost 22. PRMT picks four bytes out of eight, so the table lies as planes of low and of high
//          bytes, each in two halves of eight codes.
// Numerics the bits of nf4_dequantize: a float product that flushes to zero, one rounding to T.
// Source   PTX ISA, prmt; levels: common/nf4_levels.h.
#pragma once

#include <utility>

#include "common/nf4_levels.h"
#include "cuda/device/numbers.cuh"
#include "cuda/device/ptx.cuh"

namespace fastpeft::cuda {

// Level times scale of the sixteen codes: byte i of low[q] and high[q] make up the value of code 4q + i.
struct LevelTable {
  uint32_t low[4], high[4];
};

namespace detail {
template <typename T, size_t... q>
__device__ inline LevelTable make_level_table(float scale, std::index_sequence<q...>) {
  const uint32_t first[] = {pack_pair<T>(mul_ftz(kNF4Level<4 * q>, scale), mul_ftz(kNF4Level<4 * q + 1>, scale))...};
  const uint32_t second[] = {
      pack_pair<T>(mul_ftz(kNF4Level<4 * q + 2>, scale), mul_ftz(kNF4Level<4 * q + 3>, scale))...};
  return {{permute_bytes(first[q], second[q], 0x6420)...}, {permute_bytes(first[q], second[q], 0x7531)...}};
}
}  // namespace detail

template <typename T>
__device__ LevelTable make_level_table(float scale) {
  return detail::make_level_table<T>(scale, std::make_index_sequence<4>());
}

// The values of the four codes in the low half of `codes`, two bytes as they lie in memory: v01 of the first byte.
__device__ inline void look_up(const LevelTable& table, uint32_t codes, uint32_t& v01, uint32_t& v23) {
  const uint32_t selectors = codes & 0x7777u;
  // Byte i is all ones where nibble i, counted from the lowest, is 8 or more: signs of the nibbles, moved to a byte's
  // top.
  const uint32_t upper = permute_bytes(codes, codes << 4, 0x9d8c);
  const uint32_t low = (permute_bytes(table.low[0], table.low[1], selectors) & ~upper) |
                       (permute_bytes(table.low[2], table.low[3], selectors) & upper);
  const uint32_t high = (permute_bytes(table.high[0], table.high[1], selectors) & ~upper) |
                        (permute_bytes(table.high[2], table.high[3], selectors) & upper);
  v01 = permute_bytes(low, high, 0x4051);  // of a byte, the high nibble comes first
  v23 = permute_bytes(low, high, 0x6273);
}

}  // namespace fastpeft::cuda
