// NF4 on the host: quantise (scalar) and dequantise (AVX-512 or AVX2 where the CPU has it, else scalar).
//
// Dequantisation is what a training step on a CPU repeats for every product, so it alone is vectorised: sixteen codes
// at a time, the table in registers (one permute on AVX-512, two and a blend on AVX2). Every variant multiplies the
// same two floats and rounds once, so all give the same bits.
#include "fastpeft/nf4.h"

#include <array>
#include <cmath>
#include <vector>

#include "common/nf4_checks.h"
#include "common/nf4_levels.h"
#include "cpu/features.h"
#include "cpu/nf4_decode.h"
#include "cpu/numbers.h"
#include "cpu/parallel.h"

namespace fastpeft::cpu {
namespace {

constexpr int64_t kGrainElements = 1 << 14;  // below this a thread costs more than it brings

// bitsandbytes' host rules: a reciprocal for whole blocks, a division for the ragged last one, and absmax held away
// from zero, so that a block of zeros gets code 7 (zero itself).
template <typename T>
void quantize_block(const T* w, int64_t length, bool whole, uint8_t* codes, float* absmax) {
  constexpr float kSmallest = 1e-38f;
  float largest = 0.0f;
  for (int64_t i = 0; i < length; ++i) {
    const float magnitude = std::fabs(static_cast<float>(to_float(w[i])));
    if (!(magnitude <= largest)) largest = magnitude;  // lets a NaN through
  }
  const float divisor = std::fmax(largest, kSmallest);
  const float reciprocal = 1.0f / divisor;
  *absmax = whole ? largest : divisor;
  const auto code_at = [&](int64_t i) {
    if (i >= length) return nf4_code(0.0f);
    const float x = static_cast<float>(to_float(w[i]));
    const float scaled = whole ? x * reciprocal : x / divisor;
    return nf4_code(std::fmin(std::fmax(scaled, -1.0f), 1.0f));
  };
  for (int64_t i = 0; i < length; i += 2) {
    codes[i / 2] = static_cast<uint8_t>(code_at(i) << 4 | code_at(i + 1));
  }
}

// bitsandbytes' host code looks the 8-bit code up by a 16-bit index, so a scale near a midpoint may get its
// neighbour. The table holds, for each index, how many midpoints of the map lie below that index's value.
class NestedCodes {
 public:
  explicit NestedCodes(const float* map) : table_(kSize) {
    int code = 0;
    for (int i = 0; i < kSize; ++i) {
      const float value = -1.0f + (2.0f * static_cast<float>(i)) / (kSize - 1);
      while (code < 255 && 0.5f * (map[code] + map[code + 1]) < value) ++code;
      table_[i] = static_cast<uint8_t>(code);
    }
  }

  uint8_t operator()(float scaled) const {
    const float clamped = std::fmin(std::fmax(scaled, -1.0f), 1.0f);
    return table_[static_cast<uint16_t>(std::fma((clamped + 1.0f) * 0.5f, kSize - 1.0f, 0.5f))];
  }

 private:
  static constexpr int kSize = 65536;
  std::vector<uint8_t> table_;
};

float block_scale(const NF4View& w, int64_t block) {
  if (w.nested_absmax == nullptr) return static_cast<const float*>(w.absmax)[block];
  const uint8_t code = static_cast<const uint8_t*>(w.absmax)[block];
  return w.nested_map[code] * w.nested_absmax[block / kNestedBlock] + *w.offset;  // two roundings
}

}  // namespace

void nf4_quantize(const NF4QuantizeArgs& args, const Context& context) {
  check_nf4_quantize(args);
  dispatch(args.dtype, [&](auto zero) {
    using T = decltype(zero);
    const T* w = static_cast<const T*>(args.w);
    const int64_t blocks = ceil_div(args.numel, args.block_size);
    const int64_t grain = std::max<int64_t>(1, kGrainElements / args.block_size);
    parallel_for(blocks, grain, context.threads, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        const int64_t first = block * args.block_size;
        const int64_t length = std::min(args.block_size, args.numel - first);
        quantize_block(w + first, length, length == args.block_size, args.codes + first / 2, args.absmax + block);
      }
    });
  });
}

void nf4_quantize_scales(const NF4QuantizeScalesArgs& args, const Context&) {
  check(args.blocks >= 0, "nf4_quantize_scales: blocks is ", args.blocks);
  const NestedCodes nested_code(args.nested_map);
  const float offset = *args.offset;
  for (int64_t first = 0; first < args.blocks; first += kNestedBlock) {
    const int64_t end = std::min(args.blocks, first + kNestedBlock);
    float largest = 0.0f;
    for (int64_t i = first; i < end; ++i) largest = std::fmax(largest, std::fabs(args.absmax[i] - offset));
    args.nested_absmax[first / kNestedBlock] = largest;
    const float reciprocal = 1.0f / largest;
    for (int64_t i = first; i < end; ++i) {
      args.quantized[i] = largest == 0.0f ? 0 : nested_code((args.absmax[i] - offset) * reciprocal);
    }
  }
}

void nf4_dequantize(const NF4DequantizeArgs& args, const Context& context) {
  check_nf4_dequantize(args);
  const int64_t block_size = args.w.block_size;
  dispatch(args.dtype, [&](auto zero) {
    using T = decltype(zero);
    T* out = static_cast<T*>(args.out);
    const DecodeBlock<T> decode = choose_decode<T>(cpu_features());
    const int64_t first_block = args.begin / block_size;
    const int64_t blocks = ceil_div(args.end - args.begin, block_size);
    const int64_t grain = std::max<int64_t>(1, kGrainElements / block_size);
    parallel_for(blocks, grain, context.threads, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        const int64_t offset = block * block_size;
        const int64_t length = std::min(block_size, args.end - args.begin - offset);
        decode(args.w.codes + (args.begin + offset) / 2, block_scale(args.w, first_block + block), length,
               out + offset);
      }
    });
  });
}

}  // namespace fastpeft::cpu
