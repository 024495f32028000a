// The few types that every interface header shares.
#pragma once

#include <cstdint>

namespace fastpeft {

// Numbers are part of the Python binding (fastpeft/ops/native.py): append, never renumber.
enum class DType : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2, kFloat64 = 3 };

// Where a call runs. On a GPU `stream` is the caller's cudaStream_t; on the CPU `threads` says how many to use.
struct Context {
  std::uintptr_t stream = 0;
  int threads = 1;
};

}  // namespace fastpeft
