// What a stream is being captured into.
#pragma once

#include <cstdint>

#include "fastpeft/types.h"

namespace fastpeft::cuda {

// A number that no other capture of this process has, the same for all streams of one; 0: the stream is not captured.
uint64_t capture_id(const Context& context);

}  // namespace fastpeft::cuda
