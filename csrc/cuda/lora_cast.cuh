// Copies of adapter matrices in a 16-bit type, padded with rows of zeros.
#pragma once

#include <cstdint>

#include "cuda/device/numbers.cuh"
#include "fastpeft/lora.h"

namespace fastpeft::cuda::lora_cast {

struct Segment {
  const float* from;  // [rows, columns]
  void* to;           // [to_rows, columns], columns % 8 == 0, at a 16-byte boundary
  int rows, columns;
  int64_t end;  // in eights of elements, all segments laid end to end
};

struct Segments {
  Segment list[kMostAdapters];
  int count;
};

inline void append(Segments& s, const float* from, void* to, int64_t rows, int64_t columns, int64_t to_rows) {
  const int64_t begin = s.count == 0 ? 0 : s.list[s.count - 1].end;
  s.list[s.count++] = {from, to, static_cast<int>(rows), static_cast<int>(columns), begin + to_rows * columns / 8};
}
inline int64_t total(const Segments& s) { return s.count == 0 ? 0 : s.list[s.count - 1].end; }

// Eight elements, number `at` of all.
template <typename T>
__device__ inline void cast(const Segments& segments, int64_t at) {
  int64_t begin = 0;
#pragma unroll 1
  for (int i = 0; i < segments.count; ++i) {
    const Segment& s = segments.list[i];
    if (at < s.end) {
      const int64_t first = (at - begin) * 8;
      const int row = static_cast<int>(first / s.columns);
      Pack<T, 8> pack;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        pack.values[j] = from_float<T>(row < s.rows ? s.from[first + j] : 0.0f);
      }
      store_pack(static_cast<T*>(s.to) + first, pack);
      return;
    }
    begin = s.end;
  }
}

constexpr int kThreads = 256;

template <typename T>
__global__ void __launch_bounds__(kThreads) kernel(const __grid_constant__ Segments segments) {
  wait_for_kernel_before();
  let_next_kernel_start();
  cast<T>(segments, blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x);
}

}  // namespace fastpeft::cuda::lora_cast
