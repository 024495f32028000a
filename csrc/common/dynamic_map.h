// The 8-bit dynamic maps of bitsandbytes' optimizers, to the bit, and the code nearest to a value.
//
// Layout   signed:   codes 0 to 126 are negative, 127 is zero, 128 to 254 positive, 255 is 1
//          unsigned: code 0 is zero, 1 to 254 positive, 255 is 1
//          Exponent e, from -6 to 0, holds the means of equal intervals of [0.1, 1], times 10^e: 2^(e + 6) of them in
//          the signed map, twice as many in the other.
// Plan     A float's exponent and seven bits of its mantissa name a bin so narrow that at most one midpoint between
//          neighbouring values lies in it: a look-up and one comparison find the nearest, where a search takes eight.
//
// Source   Dettmers et al., "8-bit optimizers via block-wise quantization", arXiv 2110.02861, section 1.3.
#pragma once

#include <bit>
#include <cstdint>

#include "common/host_device.h"

namespace fastpeft {

constexpr int kDynamicFirstBin = (127 - 23) << 7;  // of 2^-23, less than half of either map's smallest value
constexpr int kDynamicBins = (127 << 7) - kDynamicFirstBin + 1;  // the last is that of 1
constexpr int kSignedZero = 127;

// Magnitudes of a map, ascending from zero, and what finds the nearest.
template <bool kSigned>
struct DynamicMap {
  static constexpr int kMagnitudes = kSigned ? 129 : 256;
  float magnitudes[kMagnitudes];
  float midpoints[kMagnitudes];   // to the next one; behind the last, more than any value
  uint8_t nearest[kDynamicBins];  // magnitude nearest to a bin's lower end

  constexpr DynamicMap() : magnitudes{}, midpoints{}, nearest{} {
    int count = 1;
    double power = 1e-6;
    constexpr double kPowers[7] = {1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0};
    for (int e = 0; e < 7; ++e) {
      power = kPowers[e];
      const int intervals = 1 << (kSigned ? e : e + 1);
      for (int i = 0; i < intervals; ++i) {
        const float mean = (edge(i, intervals) + edge(i + 1, intervals)) / 2.0f;
        magnitudes[count++] = static_cast<float>(power) * mean;
      }
    }
    magnitudes[count] = 1.0f;
    for (int i = 0; i + 1 < kMagnitudes; ++i) midpoints[i] = 0.5f * (magnitudes[i] + magnitudes[i + 1]);
    midpoints[kMagnitudes - 1] = 3e38f;
    int code = 0;
    for (int bin = 0; bin < kDynamicBins; ++bin) {
      while (lower_end(bin) > midpoints[code]) ++code;
      nearest[bin] = static_cast<uint8_t>(code);
    }
  }

  // No bin has two midpoints, and what is below the first bin is nearest to zero.
  constexpr bool holds() const {
    for (int bin = 0; bin + 1 < kDynamicBins; ++bin) {
      if (nearest[bin + 1] > nearest[bin] + 1) return false;
    }
    return nearest[0] == 0 && nearest[kDynamicBins - 1] == kMagnitudes - 1;
  }

  // The value of a code.
  constexpr float value(int code) const {
    if constexpr (!kSigned) return magnitudes[code];
    return code < kSignedZero ? -magnitudes[kSignedZero - code] : magnitudes[code - kSignedZero];
  }

 private:
  // torch.linspace(0.1, 1, intervals + 1)[i] in float32: fused multiply-adds from either end.
  static constexpr float edge(int i, int intervals) {
    const float start = 0.1f, step = (1.0f - start) / static_cast<float>(intervals);
    if (i < (intervals + 1) / 2) return static_cast<float>(static_cast<double>(start) + static_cast<double>(step) * i);
    return static_cast<float>(1.0 - static_cast<double>(step) * (intervals - i));
  }
  static constexpr float lower_end(int bin) {
    return std::bit_cast<float>(static_cast<uint32_t>(bin + kDynamicFirstBin) << 16);
  }
};

static_assert(DynamicMap<true>().holds() && DynamicMap<false>().holds());

// Number of the magnitude nearest to x >= 0; NaN gives that of 1.
FASTPEFT_HOST_DEVICE inline int nearest_magnitude(float x, const uint8_t* nearest, const float* midpoints) {
  const int bin = static_cast<int>(std::bit_cast<uint32_t>(x) >> 16) - kDynamicFirstBin;
  const int code = nearest[bin < 0 ? 0 : bin >= kDynamicBins ? kDynamicBins - 1 : bin];
  return code + (x > midpoints[code] ? 1 : 0);
}

// The signed map has 1 but not -1.
FASTPEFT_HOST_DEVICE inline int signed_code(float x, const uint8_t* nearest, const float* midpoints) {
  const int magnitude = nearest_magnitude(x < 0.0f ? -x : x, nearest, midpoints);
  return x < 0.0f ? kSignedZero - (magnitude > kSignedZero ? kSignedZero : magnitude) : kSignedZero + magnitude;
}

// Of a second moment: one above zero never becomes zero, as the first moment over eps would follow.
FASTPEFT_HOST_DEVICE inline int unsigned_code(float x, float unscaled, const uint8_t* nearest, const float* midpoints) {
  const int magnitude = nearest_magnitude(x, nearest, midpoints);
  return magnitude == 0 && unscaled > 0.0f ? 1 : magnitude;
}

// What a block's values are multiplied by before they are rounded to codes.
FASTPEFT_HOST_DEVICE inline float inverse_absmax(float absmax) {
  return absmax < 1.17549435e-38f ? 0.0f : 1.0f / absmax;
}

}  // namespace fastpeft
