// How the threads of the RMSNorm kernels share the rows; pure host code.
//
// A row lies in the registers of its threads, in packs of 16 bytes: two packs a thread in rows of up to 64 packs, which
// share a warp with other rows, four in longer ones, which have a thread block to themselves.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/integer.h"

namespace fastpeft::cuda {

struct RmsNormConfig {
  bool in_registers;  // else the general kernel: a row a block, elements one by one
  bool wide;          // a row has a thread block to itself
  int lanes;          // threads of a row; a power of two where rows share a warp
  int threads;        // of a block
  int64_t rows;       // of a block at a time
};

inline constexpr int kRmsNormNarrowPacks = 2;
inline constexpr int kRmsNormWidePacks = 4;
inline constexpr int kRmsNormMostThreads = 512;
inline constexpr int kRmsNormNarrowThreads = 128;
inline constexpr int kRmsNormGeneralThreads = 256;

inline RmsNormConfig rms_norm_config(int64_t width, int element_bytes, bool aligned) {
  const int64_t each = 16 / element_bytes;
  const int64_t packs = width / each;
  if (!aligned || width % each != 0 || packs > int64_t{kRmsNormMostThreads} * kRmsNormWidePacks) {
    return {false, true, kRmsNormGeneralThreads, kRmsNormGeneralThreads, 1};
  }
  if (packs <= 32 * kRmsNormNarrowPacks) {
    int lanes = 1;
    while (lanes * kRmsNormNarrowPacks < packs) lanes *= 2;
    return {true, false, lanes, kRmsNormNarrowThreads, kRmsNormNarrowThreads / lanes};
  }
  const int threads = static_cast<int>(ceil_div(packs, kRmsNormWidePacks * 32) * 32);
  return {true, true, threads, threads, 1};
}

// Blocks of the backward kernel when it sums dweight, each of which writes a row of partial sums: as many as are
// resident at once, so that the partials stay few. `sms` is the number of multiprocessors, 0 on the CPU.
inline int64_t rms_norm_partial_rows(int64_t rows, int64_t width, int element_bytes, int sms) {
  if (sms == 0) return std::min<int64_t>(rows, 64);  // whatever the number of threads, so that sums do not depend on it
  const RmsNormConfig config = rms_norm_config(width, element_bytes, true);
  const int64_t resident = sms * std::max<int64_t>(1, kRmsNormMostThreads / config.threads);
  return std::min(ceil_div(rows, config.rows), resident);
}

}  // namespace fastpeft::cuda
