// Sixteen levels times a scale, looked up by NF4 code in registers: the arithmetic of the decoders, callable on the
// host for its checks.
//
// Plan     the 16 products of a 64-block are rounded to bf16 once (32 instructions), then 8 weights cost 22: PRMT picks
//          bytes from two registers by four selectors at a time, so the table lies in planes of low and of high bytes.
// Source   PRMT: PTX ISA, prmt; the levels: common/nf4_levels.h.
#pragma once

#include <stdint.h>
#include <string.h>

#include <utility>

#include "common/nf4_levels.h"
#include "plan.h"

namespace lab {

// Default mode: a selector's low three bits pick a byte of {b, a}, its top bit replicates that byte's sign instead.
LAB_HD uint32_t prmt(uint32_t a, uint32_t b, uint32_t selectors) {
#ifdef __CUDA_ARCH__
  uint32_t v;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(v) : "r"(a), "r"(b), "r"(selectors));
  return v;
#else
  const uint64_t both = a | static_cast<uint64_t>(b) << 32;
  uint32_t v = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t s = selectors >> (4 * i) & 15, byte = both >> (8 * (s & 7)) & 255;
    v |= (s & 8 ? (byte & 128 ? 255u : 0u) : byte) << (8 * i);
  }
  return v;
#endif
}

LAB_HD uint32_t pack_bf16(float lo, float hi) {  // round to nearest even
#ifdef __CUDA_ARCH__
  uint32_t v;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(hi), "f"(lo));  // the first source is the upper half
  return v;
#else
  uint32_t bits[2];
  memcpy(&bits[0], &lo, 4), memcpy(&bits[1], &hi, 4);
  for (uint32_t& u : bits) u = (u & 0x7fffffff) > 0x7f800000 ? 0x7fff : (u + 0x7fff + (u >> 16 & 1)) >> 16;
  return bits[0] | bits[1] << 16;
#endif
}

struct Table {
  uint32_t low[4], high[4];
};
template <size_t... q>
LAB_HD void fill_table(Table& t, float scale, std::index_sequence<q...>) {
  using fastpeft::kNF4Level;
  const uint32_t p0[] = {pack_bf16(kNF4Level<4 * q> * scale, kNF4Level<4 * q + 1> * scale)...};
  const uint32_t p1[] = {pack_bf16(kNF4Level<4 * q + 2> * scale, kNF4Level<4 * q + 3> * scale)...};
  ((t.low[q] = prmt(p0[q], p1[q], 0x6420), t.high[q] = prmt(p0[q], p1[q], 0x7531)), ...);
}
LAB_HD Table make_table(float scale) {
  Table t;
  fill_table(t, scale, std::make_index_sequence<4>());
  return t;
}

// Four codes, the low sixteen bits of g, to four values in order; each half of the table once, then a select.
LAB_HD void look_up(const Table& t, uint32_t g, uint32_t& v01, uint32_t& v23) {
  const uint32_t sel = g & 0x7777u;
  // Byte i is all ones where code i (nibble order: first byte low, high, second byte low, high) is 8 or more.
  const uint32_t mask = prmt(g, g << 4, 0x9d8c);
  const uint32_t l0 = prmt(t.low[0], t.low[1], sel), l1 = prmt(t.low[2], t.low[3], sel);
  const uint32_t h0 = prmt(t.high[0], t.high[1], sel), h1 = prmt(t.high[2], t.high[3], sel);
  const uint32_t l = (l0 & ~mask) | (l1 & mask), h = (h0 & ~mask) | (h1 & mask);
  v01 = prmt(l, h, 0x4051);  // the high nibble comes first
  v23 = prmt(l, h, 0x6273);
}

}  // namespace lab
