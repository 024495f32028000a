// Integer helpers shared by both backends.
#pragma once

#include <cstdint>

namespace fastpeft {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Of a power of two.
constexpr int log2_of(int64_t power) {
  int exponent = 0;
  while ((int64_t{1} << exponent) < power) ++exponent;
  return exponent;
}

constexpr bool is_power_of_two(int64_t x) { return x > 0 && (x & (x - 1)) == 0; }

}  // namespace fastpeft
