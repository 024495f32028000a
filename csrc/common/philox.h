// Philox4x32-7, the counter-based generator behind dropout: four 32-bit numbers from (counter, key), no state.
//
// Seven rounds are the fewest that pass BigCrush, and what the paper recommends where time counts; ten are its margin.
//
// Source   Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011, sections 3.2 and 4, table 2.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace fastpeft {

struct Philox4 {
  uint32_t words[4];
};

constexpr int kPhiloxRounds = 7;

// The keys of all rounds. Made on the host they are constants to a kernel and take no registers.
struct PhiloxKeys {
  uint32_t low[kPhiloxRounds], high[kPhiloxRounds];
};
FASTPEFT_HOST_DEVICE inline PhiloxKeys philox_keys(uint64_t key) {
  PhiloxKeys keys;
#ifdef __CUDA_ARCH__
#pragma unroll
#endif
  for (uint32_t round = 0; round < kPhiloxRounds; ++round) {
    keys.low[round] = static_cast<uint32_t>(key) + round * 0x9E3779B9;
    keys.high[round] = static_cast<uint32_t>(key >> 32) + round * 0xBB67AE85;
  }
  return keys;
}

FASTPEFT_HOST_DEVICE inline void philox_round(Philox4& state, uint32_t low_key, uint32_t high_key) {
  const uint64_t product0 = uint64_t{0xD2511F53} * state.words[0], product1 = uint64_t{0xCD9E8D57} * state.words[2];
  state = {{static_cast<uint32_t>(product1 >> 32) ^ state.words[1] ^ low_key, static_cast<uint32_t>(product1),
            static_cast<uint32_t>(product0 >> 32) ^ state.words[3] ^ high_key, static_cast<uint32_t>(product0)}};
}

// Of a counter of two words, the upper two being zero.
FASTPEFT_HOST_DEVICE inline Philox4 philox(uint32_t c0, uint32_t c1, const PhiloxKeys& keys) {
  Philox4 state{{c0, c1, 0, 0}};
#ifdef __CUDA_ARCH__
#pragma unroll
#endif
  for (int round = 0; round < kPhiloxRounds; ++round) philox_round(state, keys.low[round], keys.high[round]);
  return state;
}

}  // namespace fastpeft
