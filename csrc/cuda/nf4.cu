// NF4 on CUDA: quantise, quantise the scales, dequantise; each one launch.
//
// Layout   fastpeft/nf4.h
// Plan     A thread owns eight consecutive elements: 16 or 32 bytes of weights, four bytes of codes. A quantisation
//          block is block_size / 8 neighbouring threads, which agree on its absmax by shuffles and, from 512 elements
//          on, through shared memory. Dequantisation looks levels up in shared memory: sixteen entries lie in sixteen
//          banks, so 32 lanes never conflict.
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

constexpr int kEach = 8;  // elements a thread owns
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

__device__ inline float block_scale(const NF4View& w, int64_t block) {
  if (w.nested_absmax == nullptr) return static_cast<const float*>(w.absmax)[block];
  const uint8_t code = static_cast<const uint8_t*>(w.absmax)[block];
  const float scale = mul_ftz(__ldg(w.nested_map + code), __ldg(w.nested_absmax + block / kNestedBlock));
  return __fadd_rn(scale, __ldg(w.offset));
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    dequantize_kernel(NF4View w, int block_shift, int64_t begin, int64_t end, T* __restrict__ out, bool aligned) {
  __shared__ float levels[16];
  if (threadIdx.x < 16) levels[threadIdx.x] = nf4_level(threadIdx.x);
  __syncthreads();
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads * kEach;
  for (int64_t first = begin + (blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x) * kEach; first < end;
       first += stride) {
    const float scale = block_scale(w, first >> block_shift);
    const bool whole = first + kEach <= end;
    uint32_t packed = 0;
    if (whole) {
      packed = *reinterpret_cast<const uint32_t*>(w.codes + first / 2);
    } else {
      for (int i = 0; first + 2 * i < end; ++i) packed |= static_cast<uint32_t>(w.codes[first / 2 + i]) << (8 * i);
    }
    Pack<T, kEach> pack;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const uint32_t code = (packed >> (i / 2 * 8 + (i % 2 == 0 ? 4 : 0))) & 15;
      pack.values[i] = from_float<T>(mul_ftz(levels[code], scale));
    }
    T* to = out + (first - begin);
    if (whole && aligned) {
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
  int block_shift = 0;
  while ((int64_t{1} << block_shift) < args.w.block_size) ++block_shift;
  dispatch("nf4_dequantize", args.dtype, [&](auto zero) {
    using T = decltype(zero);
    launch([&] { return concat("nf4_dequantize of elements ", args.begin, " to ", args.end); }, dequantize_kernel<T>,
           cover(args.end - args.begin, kThreads * kEach, kThreads), context, args.w, block_shift, args.begin, args.end,
           static_cast<T*>(args.out), is_aligned(args.out));
  });
}

}  // namespace fastpeft::cuda
