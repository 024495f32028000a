// The dropout rule, shared by both backends so that their masks are equal.
#pragma once

#include <cstdint>

#include "common/error.h"
#include "common/philox.h"
#include "fastpeft/dropout.h"

namespace fastpeft {

// An element is kept when its 32 random bits are not below this.
inline uint64_t dropout_threshold(double p) { return static_cast<uint64_t>(p * 4294967296.0); }

inline void check_dropout(const DropoutArgs& args) {
  check(args.numel >= 0, "dropout: numel is ", args.numel);
  check(args.p >= 0.0 && args.p < 1.0, "dropout: p is ", args.p, "; it must be at least 0 and below 1");
}

}  // namespace fastpeft
