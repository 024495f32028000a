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

template <bool kSigned>
struct DynamicMap {
  static constexpr int kMagnitudes = kSigned ? 129 : 256;      // ascending from zero
  float values[256];                                           // by code
  float midpoints[256];                                        // from a magnitude to the next one
  alignas(16) uint8_t nearest[(kDynamicBins + 15) / 16 * 16];  // magnitude nearest to a bin's lower end

  constexpr DynamicMap() : values{}, midpoints{}, nearest{} {
    constexpr double kPowers[7] = {1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0};
    float magnitudes[kMagnitudes] = {};
    int count = 1;
    for (int e = 0; e < 7; ++e) {
      const int intervals = 1 << (kSigned ? e : e + 1);
      for (int i = 0; i < intervals; ++i) {
        const float mean = (edge(i, intervals) + edge(i + 1, intervals)) / 2.0f;
        magnitudes[count++] = static_cast<float>(kPowers[e]) * mean;
      }
    }
    magnitudes[count] = 1.0f;
    for (int code = 0; code < 256; ++code) {
      values[code] = !kSigned             ? magnitudes[code]
                     : code < kSignedZero ? -magnitudes[kSignedZero - code]
                                          : magnitudes[code - kSignedZero];
    }
    for (float& midpoint : midpoints) midpoint = std::bit_cast<float>(0x7fffffff);  // a NaN, above all by its bits
    for (int i = 0; i + 1 < kMagnitudes; ++i) midpoints[i] = 0.5f * (magnitudes[i] + magnitudes[i + 1]);
    int magnitude = 0;
    for (int bin = 0; bin < kDynamicBins; ++bin) {
      while (magnitude + 1 < kMagnitudes && lower_end(bin) > midpoints[magnitude]) ++magnitude;
      nearest[bin] = static_cast<uint8_t>(magnitude);
    }
  }

  // No bin has two midpoints, and what is below the first bin is nearest to zero.
  constexpr bool holds() const {
    for (int bin = 0; bin + 1 < kDynamicBins; ++bin) {
      if (nearest[bin + 1] > nearest[bin] + 1) return false;
    }
    return nearest[0] == 0 && nearest[kDynamicBins - 1] == kMagnitudes - 1;
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

// Codes are found without branches, so that loops vectorise, and floats above zero compared by their bits, NaN last.
// `nearest` and `midpoints` are a map's, in whatever memory and width suits the caller.

// Number of the magnitude nearest to the value of `bits`, which is not negative; NaN gives that of 1.
template <typename Nearest>
FASTPEFT_HOST_DEVICE inline int nearest_magnitude(int bits, const Nearest* nearest, const float* midpoints) {
  int bin = (bits >> 16) - kDynamicFirstBin;
  bin = bin < 0 ? 0 : bin;
  bin = bin < kDynamicBins - 1 ? bin : kDynamicBins - 1;
  const int magnitude = static_cast<int>(nearest[bin]);
  return magnitude + static_cast<int>(bits > std::bit_cast<int>(midpoints[magnitude]));
}

// The signed map has 1 but not -1.
template <typename Nearest>
FASTPEFT_HOST_DEVICE inline int signed_code(float x, const Nearest* nearest, const float* midpoints) {
  const int bits = std::bit_cast<int>(x), sign = bits >> 31;  // 0 or -1
  const int magnitude = nearest_magnitude(bits & 0x7fffffff, nearest, midpoints), most = kSignedZero + 1 + sign;
  return kSignedZero + (((magnitude < most ? magnitude : most) ^ sign) - sign);
}

// Of a second moment: one above zero never becomes zero, as the first moment over eps would follow.
template <typename Nearest>
FASTPEFT_HOST_DEVICE inline int unsigned_code(float x, float unscaled, const Nearest* nearest, const float* midpoints) {
  const int magnitude = nearest_magnitude(std::bit_cast<int>(x), nearest, midpoints);
  const int least = static_cast<int>(std::bit_cast<int>(unscaled) > 0);
  return magnitude > least ? magnitude : least;
}

// What a block's values are multiplied by before they are rounded to codes.
FASTPEFT_HOST_DEVICE inline float inverse_absmax(float absmax) {
  return absmax < 1.17549435e-38f ? 0.0f : 1.0f / absmax;
}

}  // namespace fastpeft
