// A parallel loop over chunks, on OpenMP where the compiler has it.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/integer.h"

namespace fastpeft::cpu {

// Calls body(begin, end) on disjoint ranges that cover [0, count); each range but the last is a multiple of `grain`.
// `body` must not throw.
template <typename Body>
void parallel_for(int64_t count, int64_t grain, int threads, const Body& body) {
  const int64_t chunks = ceil_div(count, grain);
  const int used = static_cast<int>(std::min<int64_t>(threads, chunks));
  if (used <= 1) {
    if (count > 0) body(int64_t{0}, count);
    return;
  }
  const int64_t each = ceil_div(chunks, used) * grain;
#pragma omp parallel for num_threads(used) schedule(static, 1)
  for (int worker = 0; worker < used; ++worker) {
    const int64_t begin = std::min(count, worker * each);
    const int64_t end = std::min(count, begin + each);
    if (begin < end) body(begin, end);
  }
}

}  // namespace fastpeft::cpu
