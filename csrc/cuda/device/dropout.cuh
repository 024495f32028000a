// Dropout of eight 16-bit elements in registers.
#pragma once

#include <cstdint>

#include "common/philox.h"

namespace fastpeft::cuda {

namespace detail {
__device__ inline uint32_t kept_pair(uint32_t first, uint32_t second, uint32_t threshold) {
  return (first >= threshold ? 0x0000ffffu : 0u) | (second >= threshold ? 0xffff0000u : 0u);
}
}  // namespace detail

// Zeroes what the mask drops of elements 4 * quad to 4 * quad + 7; what stays is not scaled.
__device__ inline void drop_eight(uint4& v, uint64_t quad, uint64_t seed, uint32_t threshold) {
  const Philox4 low = philox(quad, seed), high = philox(quad + 1, seed);
  v.x &= detail::kept_pair(low.words[0], low.words[1], threshold);
  v.y &= detail::kept_pair(low.words[2], low.words[3], threshold);
  v.z &= detail::kept_pair(high.words[0], high.words[1], threshold);
  v.w &= detail::kept_pair(high.words[2], high.words[3], threshold);
}

}  // namespace fastpeft::cuda
