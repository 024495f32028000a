// Where a list's table has what: the rows and what belongs to them, in one allocation on the device.
#pragma once

#include "common/adamw_math.h"
#include "common/integer.h"
#include "fastpeft/adamw.h"

namespace fastpeft {

constexpr int64_t kAdamWChunk = 4096;  // elements of a thread block; whole blocks of 8-bit state

// Byte offsets, each on the 16-byte grid.
struct AdamWTable {
  int64_t rows, tensors, first_chunks, factors, grads, bytes;
  // Of it, up to `factors`, never changes.

  explicit AdamWTable(const AdamWList& list) {
    const auto row_count = static_cast<int64_t>(list.rows.size());
    const auto tensor_count = static_cast<int64_t>(list.tensors.size());
    bytes = 0;
    rows = take(row_count * static_cast<int64_t>(sizeof(AdamWRow)));
    tensors = take(tensor_count * static_cast<int64_t>(sizeof(AdamWTensor)));
    first_chunks = take(row_count * static_cast<int64_t>(sizeof(uint32_t)));
    factors = take(tensor_count * static_cast<int64_t>(sizeof(AdamWFactors)));
    grads = take(row_count * static_cast<int64_t>(sizeof(void*)));
  }

 private:
  int64_t take(int64_t size) {
    const int64_t start = bytes;
    bytes += ceil_div(size, 16) * 16;
    return start;
  }
};

inline int64_t adamw_table_bytes(const AdamWList& list) { return AdamWTable(list).bytes; }

}  // namespace fastpeft
