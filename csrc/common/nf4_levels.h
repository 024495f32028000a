// The one NF4 table: sixteen quantiles of a normal distribution, scaled to [-1, 1], with an exact zero at code 7.
//
// Source   QLoRA (arXiv 2305.14314), appendix E; the float values are those of bitsandbytes 0.50.2.
#pragma once

#include <cstddef>
#include <utility>

#include "common/host_device.h"

namespace fastpeft {

inline constexpr float kNF4Levels[16] = {
    -1.0f,
    -0.6961928009986877f,
    -0.5250730514526367f,
    -0.39491748809814453f,
    -0.28444138169288635f,
    -0.18477343022823334f,
    -0.09105003625154495f,
    0.0f,
    0.07958029955625534f,
    0.16093020141124725f,
    0.24611230194568634f,
    0.33791524171829224f,
    0.44070982933044434f,
    0.5626170039176941f,
    0.7229568362236023f,
    1.0f,
};

// The table by constant index, for device code, which cannot index a host array at run time.
template <size_t i>
inline constexpr float kNF4Level = kNF4Levels[i];

// Above it, code i + 1 is nearer than code i. Rounded to float these are the values bitsandbytes writes out.
template <size_t i>
inline constexpr float kNF4Threshold = (kNF4Levels[i] + kNF4Levels[i + 1]) * 0.5f;

namespace detail {
template <size_t... i>
FASTPEFT_HOST_DEVICE constexpr int count_thresholds_below(float x, std::index_sequence<i...>) {
  return ((x > kNF4Threshold<i> ? 1 : 0) + ...);
}

template <size_t... i>
FASTPEFT_HOST_DEVICE constexpr float select_level(int code, std::index_sequence<i...>) {
  float level = 0.0f;
  ((level = code == static_cast<int>(i) ? kNF4Level<i> : level), ...);
  return level;
}
}  // namespace detail

// Code of the level nearest to x; NaN gives 0, as every comparison with it is false.
FASTPEFT_HOST_DEVICE constexpr int nf4_code(float x) {
  return detail::count_thresholds_below(x, std::make_index_sequence<15>());
}

// Level of a code by sixteen selects: for filling a table, not for decoding.
FASTPEFT_HOST_DEVICE constexpr float nf4_level(int code) {
  return detail::select_level(code, std::make_index_sequence<16>());
}

}  // namespace fastpeft
