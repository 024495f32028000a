// NF4 on CUDA: quantise, quantise the scales, dequantise; each one launch.
//
// Layout   fastpeft/nf4.h
// Plan     A thread owns eight consecutive elements, or two times eight when dequantising; eight are 16 or 32 bytes of
//          weights, four bytes of codes. A quantisation block is block_size / 8 neighbouring threads, which agree on
//          its absmax by shuffles and, from 512 elements on, through shared memory. Dequantisation looks levels up in
//          shared memory: sixteen entries lie in sixteen banks, so 32 lanes never conflict.
// Limits   The last, ragged eight go element by element, as does everything when a pointer is not 16-byte aligned.
// Source   Rounding as bitsandbytes 0.50.2 is compiled: flush-to-zero products and an approximate reciprocal.
#include "fastpeft/nf4.h"

#include "common/nf4_checks.h"
#include "common/nf4_levels.h"
#include "cuda/device/launch.cuh"
#include "cuda/device/numbers.cuh"
#include "cuda/device/ptx.cuh"

namespace fastpeft::cuda {
namespace {

constexpr int kEach = 8;    // elements of a chunk, which one thread owns
constexpr int kChunks = 2;  // chunks a thread dequantises
constexpr int kThreads = 512;
constexpr unsigned kFullWarp = 0xffffffff;

// --- kernels ---------------------------------------------------------------------------------------------------------

// The largest value among `kGroup` neighbouring threads, a power of two, in all of them.
template <int kGroup>
__device__ float group_max(float value, float* shared) {
  constexpr int kInWarp = kGroup < 32 ? kGroup : 32;
#pragma unroll
  for (int step = kInWarp / 2; step > 0; step /= 2) {
    value = max_ftz(value, __shfl_xor_sync(kFullWarp, value, step));
  }
  if constexpr (kGroup > 32) {
    constexpr int kWarps = kGroup / 32;
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
    __syncthreads();
    const int first = threadIdx.x / kGroup * kWarps;
    value = shared[first];
#pragma unroll
    for (int i = 1; i < kWarps; ++i) value = max_ftz(value, shared[first + i]);
    __syncthreads();
  }
  return value;
}

template <typename T, int kBlockSize>
__global__ void __launch_bounds__(kThreads)
    quantize_kernel(const T* __restrict__ w, int64_t numel, uint8_t* __restrict__ codes, float* __restrict__ absmax,
                    bool aligned) {
  constexpr int kGroup = kBlockSize / kEach;
  __shared__ float shared[kThreads / 32];
  const int64_t chunk = static_cast<int64_t>(kThreads) * kEach;
  // Whole thread blocks step together, so that every thread reaches the reductions.
  for (int64_t base = blockIdx.x * chunk; base < numel; base += gridDim.x * chunk) {
    const int64_t first = base + threadIdx.x * kEach;
    float values[kEach];
    if (aligned && first + kEach <= numel) {
      const auto pack = load_pack<T, kEach>(w + first);
#pragma unroll
      for (int i = 0; i < kEach; ++i) values[i] = to_float(pack.values[i]);
    } else {
#pragma unroll
      for (int i = 0; i < kEach; ++i) values[i] = first + i < numel ? to_float(w[first + i]) : 0.0f;
    }
    float largest = 0.0f;
#pragma unroll
    for (int i = 0; i < kEach; ++i) largest = max_ftz(largest, fabsf(values[i]));
    largest = group_max<kGroup>(largest, shared);
    if (first >= numel) continue;

    if (first % kBlockSize == 0) absmax[first / kBlockSize] = largest;
    const float reciprocal = rcp_approx_ftz(largest);
    uint32_t packed = 0;  // first code in the high nibble of the lowest byte
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const uint32_t code = nf4_code(mul_ftz(values[i], reciprocal));
      packed |= code << (i / 2 * 8 + (i % 2 == 0 ? 4 : 0));
    }
    if (first + kEach <= numel) {
      *reinterpret_cast<uint32_t*>(codes + first / 2) = packed;
    } else {
      for (int i = 0; first + 2 * i < numel; ++i) codes[first / 2 + i] = static_cast<uint8_t>(packed >> (8 * i));
    }
  }
}

// Index of the map entry that bitsandbytes picks: seven halvings, then the nearer of the last entry and the bound on
// its side. On a midpoint the last entry visited wins, so the way there is part of the result.
__device__ uint8_t nested_code(const float* map, float x) {
  int pivot = 127, lower = 0, upper = 255;
#pragma unroll
  for (int step = 64; step > 0; step /= 2) {
    if (greater_ftz(x, map[pivot])) {
      lower = pivot;
      pivot += step;
    } else {
      upper = pivot;
      pivot -= step;
    }
  }
  const float value = map[pivot];
  // An untouched lower bound counts as -1 in the search but as the map's first entry here.
  if (greater_ftz(x, value)) {
    const float midpoint = mul_ftz(add_ftz(map[upper], value), 0.5f);
    return static_cast<uint8_t>(greater_ftz(x, midpoint) ? upper : pivot);
  }
  const float midpoint = mul_ftz(add_ftz(map[lower], value), 0.5f);
  return static_cast<uint8_t>(greater_ftz(midpoint, x) ? lower : pivot);
}

// A warp quantises 256 scales, eight a lane.
__global__ void __launch_bounds__(256)
    quantize_scales_kernel(const float* __restrict__ absmax, const float* __restrict__ offset,
                           const float* __restrict__ nested_map, int64_t blocks, uint8_t* __restrict__ quantized,
                           float* __restrict__ nested_absmax) {
  __shared__ float map[256];
  map[threadIdx.x] = nested_map[threadIdx.x];
  __syncthreads();
  const int64_t warp = (blockIdx.x * 256ll + threadIdx.x) / 32;
  const int lane = threadIdx.x % 32;
  const int64_t first = warp * kNestedBlock;
  if (first >= blocks) return;
  const float mean = *offset;
  float values[kEach];
  float largest = 0.0f;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int64_t index = first + i * 32 + lane;
    values[i] = index < blocks ? __fsub_rn(absmax[index], mean) : 0.0f;
    largest = max_ftz(largest, fabsf(values[i]));
  }
  largest = group_max<32>(largest, nullptr);
  if (lane == 0) nested_absmax[warp] = largest;
  const float reciprocal = rcp_approx_ftz(largest);
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int64_t index = first + i * 32 + lane;
    if (index < blocks) quantized[index] = nested_code(map, mul_ftz(values[i], reciprocal));
  }
}

// What a chunk of eight elements is decoded from; loaded apart from its decoding, so that loads of chunks overlap.
struct Encoded {
  uint32_t codes;  // first code in the high nibble of the lowest byte
  uint32_t scale_code;
  float scale;  // the nested scale when double quantised
};

template <bool kNested>
__device__ inline Encoded load_encoded(const NF4View& w, int64_t first, int64_t end, int block_shift) {
  Encoded chunk{};
  const int64_t block = first >> block_shift;
  if constexpr (kNested) {
    chunk.scale_code = __ldg(static_cast<const uint8_t*>(w.absmax) + block);
    chunk.scale = __ldg(w.nested_absmax + block / kNestedBlock);
  } else {
    chunk.scale = __ldg(static_cast<const float*>(w.absmax) + block);
  }
  if (first + kEach <= end) {
    chunk.codes = __ldg(reinterpret_cast<const uint32_t*>(w.codes + first / 2));
  } else {
    for (int i = 0; first + 2 * i < end; ++i) chunk.codes |= static_cast<uint32_t>(w.codes[first / 2 + i]) << (8 * i);
  }
  return chunk;
}

// A thread decodes kChunks chunks, a thread block's width apart; all are loaded before the first is decoded, or too
// little is in flight (bench/LOG.md, 2026-11-25, 'More codes in flight while dequantising').
template <typename T, bool kNested>
__global__ void __launch_bounds__(kThreads)
    dequantize_kernel(NF4View w, int block_shift, int64_t begin, int64_t end, T* __restrict__ out, bool aligned) {
  __shared__ float levels[16];
  __shared__ float nested_map[256];
  const int64_t mine = begin + (blockIdx.x * static_cast<int64_t>(kThreads * kChunks) + threadIdx.x) * kEach;
  Encoded chunks[kChunks];
#pragma unroll
  for (int chunk = 0; chunk < kChunks; ++chunk) {
    const int64_t first = mine + chunk * kThreads * kEach;
    if (first < end) chunks[chunk] = load_encoded<kNested>(w, first, end, block_shift);
  }
  if (threadIdx.x < 16) levels[threadIdx.x] = nf4_level(threadIdx.x);
  float offset = 0.0f;
  if constexpr (kNested) {
    if (threadIdx.x < 256) nested_map[threadIdx.x] = __ldg(w.nested_map + threadIdx.x);
    offset = __ldg(w.offset);
  }
  __syncthreads();

#pragma unroll
  for (int chunk = 0; chunk < kChunks; ++chunk) {
    const int64_t first = mine + chunk * kThreads * kEach;
    if (first >= end) break;
    const Encoded& from = chunks[chunk];
    float scale = from.scale;
    if constexpr (kNested) scale = __fadd_rn(mul_ftz(nested_map[from.scale_code], scale), offset);
    Pack<T, kEach> pack;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const uint32_t code = (from.codes >> (i / 2 * 8 + (i % 2 == 0 ? 4 : 0))) & 15;
      pack.values[i] = from_float<T>(mul_ftz(levels[code], scale));
    }
    T* to = out + (first - begin);
    if (aligned && first + kEach <= end) {
      store_pack(to, pack);
    } else {
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        if (first + i < end) to[i] = pack.values[i];
      }
    }
  }
}

// --- launchers -------------------------------------------------------------------------------------------------------

void check_codes(const char* function, const uint8_t* codes) {
  check(reinterpret_cast<uintptr_t>(codes) % 4 == 0, function, ": the codes' address ends in ",
        reinterpret_cast<uintptr_t>(codes) % 4,
        " of 4; they must be aligned to 4 bytes (copy the tensor with clone())");
}

template <typename T, int kBlockSize>
void launch_quantize(const NF4QuantizeArgs& args, const Context& context) {
  launch([&] { return concat("nf4_quantize of ", args.numel, " elements, block size ", kBlockSize); },
         quantize_kernel<T, kBlockSize>, cover(args.numel, kThreads * kEach, kThreads), context,
         static_cast<const T*>(args.w), args.numel, args.codes, args.absmax, is_aligned(args.w));
}

template <typename T>
void choose_block_size(const NF4QuantizeArgs& args, const Context& context) {
  switch (args.block_size) {
    case 32: return launch_quantize<T, 32>(args, context);
    case 64: return launch_quantize<T, 64>(args, context);
    case 128: return launch_quantize<T, 128>(args, context);
    case 256: return launch_quantize<T, 256>(args, context);
    case 512: return launch_quantize<T, 512>(args, context);
    case 1024: return launch_quantize<T, 1024>(args, context);
    case 2048: return launch_quantize<T, 2048>(args, context);
    case 4096: return launch_quantize<T, 4096>(args, context);
  }
}

}  // namespace

void nf4_quantize(const NF4QuantizeArgs& args, const Context& context) {
  check_nf4_quantize(args);
  check_codes("nf4_quantize", args.codes);
  dispatch("nf4_quantize", args.dtype, [&](auto zero) { choose_block_size<decltype(zero)>(args, context); });
}

void nf4_quantize_scales(const NF4QuantizeScalesArgs& args, const Context& context) {
  check(args.blocks >= 0, "nf4_quantize_scales: blocks is ", args.blocks);
  launch([&] { return concat("nf4_quantize_scales of ", args.blocks, " scales"); }, quantize_scales_kernel,
         cover(args.blocks, 8 * kNestedBlock, 256), context, args.absmax, args.offset, args.nested_map, args.blocks,
         args.quantized, args.nested_absmax);
}

void nf4_dequantize(const NF4DequantizeArgs& args, const Context& context) {
  check_nf4_dequantize(args);
  check_codes("nf4_dequantize", args.w.codes);
  const int block_shift = log2_of(args.w.block_size);
  dispatch("nf4_dequantize", args.dtype, [&](auto zero) {
    using T = decltype(zero);
    launch([&] { return concat("nf4_dequantize of elements ", args.begin, " to ", args.end); },
           args.w.nested_absmax != nullptr ? dequantize_kernel<T, true> : dequantize_kernel<T, false>,
           cover(args.end - args.begin, kThreads * kChunks * kEach, kThreads), context, args.w, block_shift, args.begin,
           args.end, static_cast<T*>(args.out), is_aligned(args.out));
  });
}

}  // namespace fastpeft::cuda
