// The dropout rule (fastpeft/dropout.h), shared by both backends so that their masks are equal.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "common/error.h"
#include "common/host_device.h"
#include "common/philox.h"
#include "fastpeft/dropout.h"

namespace fastpeft {

constexpr uint32_t kMaskLevels = 1 << 15;
constexpr double kMostFusedDropout = 31.0 / 32;  // the threshold is float16's infinity (cuda/device/ptx.cuh, at_least)
constexpr int kMaskRows = 32;                    // of a block of the mask
constexpr int kMaskRowCalls = 4;                 // of a block: calls of the generator
constexpr int kMaskColumns = 2;                  // that share a call

// Of the row calls' rows: the first of `row_call`, and the i-th behind it.
FASTPEFT_HOST_DEVICE inline int64_t mask_row(int64_t row_call, int i) {
  return row_call / kMaskRowCalls * kMaskRows + row_call % kMaskRowCalls * 2 + i % 2 + i / 2 * 8;
}

// The word of a call for its i-th row: the neighbouring columns' numbers in its halves.
FASTPEFT_HOST_DEVICE inline uint32_t mask_word(const Philox4& call, int i) {
  const uint32_t word = call.words[i % 4];
  return i < 4 ? word : word >> 8 | word << 24;
}

// An element is kept when its random bits are not below this; 0: all are.
inline uint32_t dropout_threshold(double p) {
  return static_cast<uint32_t>(std::min<int64_t>(std::llround(p * kMaskLevels), kMaskLevels - 1));
}

// What the kept elements are multiplied by.
inline double dropout_scale(double p) {
  return static_cast<double>(kMaskLevels) / static_cast<double>(kMaskLevels - dropout_threshold(p));
}

// The two numbers of a word against the threshold in both halves of another: kept where the top bit of a half is set.
// A half cannot borrow from the other, whose top bit has been set before.
FASTPEFT_HOST_DEVICE inline uint32_t kept_halves(uint32_t word, uint32_t threshold_twice) {
  return (word | 0x80008000u) - threshold_twice;
}

inline void check_dropout(const DropoutArgs& args) {
  check(args.rows >= 0 && args.columns >= 0, "dropout: x is ", args.rows, " x ", args.columns);
  check(args.rows < int64_t{1} << 33 && args.columns < int64_t{1} << 32, "dropout: x is ", args.rows, " x ",
        args.columns, "; needs fewer than 2^33 rows and 2^32 columns");
  check(args.p >= 0.0 && args.p < 1.0, "dropout: p is ", args.p, "; it must be at least 0 and below 1");
}

}  // namespace fastpeft
