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

// Rounds kFrom to kTo - 1 on a counter, or on what the rounds before have made of it.
template <int kFrom, int kTo>
FASTPEFT_HOST_DEVICE inline void philox_rounds(Philox4& state, uint64_t key) {
  uint32_t c0 = state.words[0], c1 = state.words[1], c2 = state.words[2], c3 = state.words[3];
#ifdef __CUDA_ARCH__
#pragma unroll
#endif
  for (uint32_t round = kFrom; round < kTo; ++round) {
    const uint32_t k0 = static_cast<uint32_t>(key) + round * 0x9E3779B9;
    const uint32_t k1 = static_cast<uint32_t>(key >> 32) + round * 0xBB67AE85;
    const uint64_t product0 = uint64_t{0xD2511F53} * c0, product1 = uint64_t{0xCD9E8D57} * c2;
    const uint32_t next0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ k0;
    const uint32_t next2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(product1);
    c3 = static_cast<uint32_t>(product0);
    c0 = next0;
    c2 = next2;
  }
  state = {{c0, c1, c2, c3}};
}

// Of a counter of two words, the upper two being zero.
FASTPEFT_HOST_DEVICE inline Philox4 philox(uint32_t c0, uint32_t c1, uint64_t key) {
  Philox4 state{{c0, c1, 0, 0}};
  philox_rounds<0, kPhiloxRounds>(state, key);
  return state;
}

}  // namespace fastpeft
