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

// First chunk of each row; in a list of batches, counted from the first row of its batch.
inline std::vector<uint32_t> adamw_first_chunks(const AdamWList& list) {
  std::vector<uint32_t> first_chunks;
  int64_t chunks = 0;
  size_t batch = 0;
  for (const AdamWRow& row : list.rows) {
    if (batch < list.batches.size() && list.batches[batch].first_row == std::ssize(first_chunks)) {
      chunks = 0;
      ++batch;
    }
    first_chunks.push_back(static_cast<uint32_t>(chunks));
    chunks += ceil_div(row.numel, kAdamWChunk);
  }
  return first_chunks;
}

inline int64_t adamw_table_bytes(const AdamWList& list) { return AdamWTable(list).bytes; }

}  // namespace fastpeft
