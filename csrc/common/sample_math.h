// What both backends compute of a draw alike.
#pragma once

#include <cstdint>

#include "common/error.h"
#include "common/host_device.h"
#include "common/philox.h"
#include "fastpeft/sample.h"

namespace fastpeft {

constexpr float kMassOfLargest = 0x1p40f;  // below 2^23 of them can be added

inline void check_sample(const SampleArgs& args) {
  check(args.v > 0 && args.v < (int64_t{1} << 23), "sample: rows have ", args.v,
        " logits; it must be from 1 to 2^23 - 1");
}

FASTPEFT_HOST_DEVICE inline float penalised(float x, float penalty) { return x > 0.0f ? x / penalty : x * penalty; }

FASTPEFT_HOST_DEVICE inline bool is_one_of(int64_t token, const int64_t* tokens, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    if (tokens[i] == token) return true;
  }
  return false;
}

// A place among `total` masses, from 0 on.
FASTPEFT_HOST_DEVICE inline uint64_t drawn_place(uint64_t total, int64_t seed, int64_t drawn) {
  const auto count = static_cast<uint64_t>(drawn);
  const Philox4 random = philox(static_cast<uint32_t>(count), static_cast<uint32_t>(count >> 32),
                                philox_keys(static_cast<uint64_t>(seed)));
  const uint64_t bits = (static_cast<uint64_t>(random.words[0]) << 32 | random.words[1]) >> 11;
  const auto place = static_cast<uint64_t>(static_cast<double>(bits) * 0x1p-53 * static_cast<double>(total));
  return place < total ? place : total - 1;
}

// Of the masses before a token that top_p keeps; the first is always kept.
FASTPEFT_HOST_DEVICE inline uint64_t top_p_limit(uint64_t total, float top_p) {
  const auto limit = static_cast<uint64_t>(static_cast<double>(top_p) * static_cast<double>(total));
  return limit > 0 ? limit : 1;
}

}  // namespace fastpeft
