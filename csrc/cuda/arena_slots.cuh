// The three slots of an arena: while the state of one is stepped, the next comes in and the one before goes out.
#pragma once

#include <array>

#include "cuda/device/launch.cuh"
#include "fastpeft/arena.h"

namespace fastpeft::cuda {

struct Arena::Slots {
  explicit Slots(int64_t slot_bytes);
  ~Slots();
  Slots(const Slots&) = delete;
  Slots& operator=(const Slots&) = delete;

  int64_t slot_bytes;
  std::byte* memory = nullptr;
  cudaStream_t in = nullptr, update = nullptr, out = nullptr;
  cudaEvent_t start = nullptr;  // on the caller's stream
  std::array<cudaEvent_t, kArenaSlots> came{}, updated{}, left{};

  std::byte* slot(int64_t batch) const { return memory + batch % kArenaSlots * slot_bytes; }
};

}  // namespace fastpeft::cuda
