// How the threads of the RMSNorm kernels share the rows; pure host code.
//
// A row lies in the registers of its threads, in packs of 16 bytes. Rows of up to 32 packs share a warp with others,
// and a thread has one pack of each of two; longer ones have a thread block to themselves, two packs a thread, or four
// where that would take more than 512 threads.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/integer.h"

namespace fastpeft::cuda {

struct RmsNormConfig {
  bool in_registers;  // else the general kernel: a row a block, elements one by one
  int packs;          // of a row that a thread has; one where rows share a warp
  int lanes;          // threads of a row where rows share a warp, a power of two; else 1
  int threads;        // of a block
  int64_t rows;       // of a block at a time
};

inline constexpr int kRmsNormMostPacks = 4;   // of a thread
inline constexpr int kRmsNormNarrowRows = 2;  // of a thread where rows share a warp
inline constexpr int kRmsNormNarrowThreads = 256;
inline constexpr int kRmsNormNarrowBlocksAnSm = 3;  // where they sum dweight, which takes registers
inline constexpr int kRmsNormLeastThreads = 64;     // of a longer row, as an SM has room for 32 blocks
inline constexpr int kRmsNormMostThreads = 512;     // of a longer row; and of an SM where they sum dweight
inline constexpr int kRmsNormGeneralThreads = 256;

inline RmsNormConfig rms_norm_config(int64_t width, int element_bytes, bool aligned) {
  const int64_t each = 16 / element_bytes;
  const int64_t packs = width / each;
  if (!aligned || width % each != 0 || packs > int64_t{kRmsNormMostThreads} * kRmsNormMostPacks) {
    return {false, 0, 1, kRmsNormGeneralThreads, 1};
  }
  if (packs <= 32) {
    int lanes = 1;
    while (lanes < packs) lanes *= 2;
    return {true, 1, lanes, kRmsNormNarrowThreads, kRmsNormNarrowThreads / lanes * kRmsNormNarrowRows};
  }
  const int of_thread = packs <= 2 * kRmsNormMostThreads ? 2 : kRmsNormMostPacks;
  const int threads = static_cast<int>(ceil_div(packs, of_thread * 32) * 32);
  return {true, of_thread, 1, std::max(kRmsNormLeastThreads, threads), 1};
}

// Blocks of the backward kernel when it sums dweight, each of which writes a row of partial sums: as many as are
// resident at once, so that the partials stay few. `sms` is the number of multiprocessors, 0 on the CPU.
inline int64_t rms_norm_partial_rows(int64_t rows, int64_t width, int element_bytes, int sms) {
  if (sms == 0) return std::min<int64_t>(rows, 64);  // whatever the number of threads, so that sums do not depend on it
  const RmsNormConfig config = rms_norm_config(width, element_bytes, true);
  const int blocks_an_sm = config.packs == 1 ? kRmsNormNarrowBlocksAnSm : kRmsNormMostThreads / config.threads;
  return std::min(ceil_div(rows, config.rows), int64_t{sms} * blocks_an_sm);
}

}  // namespace fastpeft::cuda
