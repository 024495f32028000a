// Element types on the device: conversion, and loads and stores of eight elements at a time.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "common/error.h"
#include "cuda/device/ptx.cuh"
#include "fastpeft/types.h"

namespace fastpeft::cuda {

using BFloat16 = __nv_bfloat16;
using Float16 = __half;

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(BFloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(Float16 x) { return __half2float(x); }

template <typename T>
__device__ T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) {
  return x;
}
template <>
__device__ inline BFloat16 from_float<BFloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ inline Float16 from_float<Float16>(float x) {
  return __float2half_rn(x);
}

// Two values in one register, the first in the low half.
template <typename T>
__device__ uint32_t pack_pair(float first, float second);
template <>
__device__ inline uint32_t pack_pair<BFloat16>(float first, float second) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
  return reinterpret_cast<const uint32_t&>(pair);
}
template <>
__device__ inline uint32_t pack_pair<Float16>(float first, float second) {
  const __half2 pair = __floats2half2_rn(first, second);
  return reinterpret_cast<const uint32_t&>(pair);
}

// kCount elements that move in 16-byte accesses: two for float, one for the 16-bit types.
template <typename T, int kCount>
struct alignas(16) Pack {
  T values[kCount];
};

template <typename T, int kCount>
__device__ Pack<T, kCount> load_pack(const T* from) {
  static_assert(sizeof(T) * kCount % 16 == 0);
  Pack<T, kCount> pack;
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(pack) / 16); ++i) {
    reinterpret_cast<uint4*>(&pack)[i] = reinterpret_cast<const uint4*>(from)[i];
  }
  return pack;
}

// Makes the compiler convert a pack anew where it is used next, instead of keeping its floats in registers until then.
template <typename T, int kCount>
__device__ void keep_packed(Pack<T, kCount>& pack) {
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(pack) / 4); ++i) {
    asm volatile("" : "+r"(reinterpret_cast<uint32_t*>(&pack)[i]));
  }
}

template <typename T, int kCount>
__device__ void store_pack(T* to, const Pack<T, kCount>& pack) {
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(pack) / 16); ++i) {
    reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(&pack)[i];
  }
}

// A pack where `wanted` holds, else zeros. These loads are issued in the order they stand in, without branches between.
template <typename T, int kCount>
__device__ Pack<T, kCount> load_pack_if(bool wanted, const T* from) {
  Pack<T, kCount> pack;
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(pack) / 16); ++i) {
    reinterpret_cast<uint4*>(&pack)[i] = load_16_if(wanted, reinterpret_cast<const uint4*>(from) + i);
  }
  return pack;
}

// The same for data that is read once: it pushes nothing out of L1.
template <typename T, int kCount>
__device__ Pack<T, kCount> load_pack_once_if(bool wanted, const T* from) {
  Pack<T, kCount> pack;
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(pack) / 16); ++i) {
    reinterpret_cast<uint4*>(&pack)[i] = load_16_once_if(wanted, reinterpret_cast<const uint4*>(from) + i);
  }
  return pack;
}

// One store for every 16 bytes, where store_pack leaves it to the compiler, which cut packs made in place into words.
template <typename T, int kCount>
__device__ void store_pack_if(bool wanted, T* to, const Pack<T, kCount>& pack) {
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(pack) / 16); ++i) {
    store_16_if(wanted, reinterpret_cast<uint4*>(to) + i, reinterpret_cast<const uint4*>(&pack)[i]);
  }
}

// Calls body with a value of the C++ type that `dtype` names.
template <typename Body>
void dispatch(const char* function, DType dtype, const Body& body) {
  switch (dtype) {
    case DType::kFloat32: return body(float{});
    case DType::kFloat16: return body(Float16{});
    case DType::kBFloat16: return body(BFloat16{});
    case DType::kFloat64: break;
  }
  throw ArgumentError(concat(function, ": float64 is not supported on CUDA; use float32, float16 or bfloat16"));
}

// The same for functions of float16 and bfloat16 alone.
template <typename Body>
void dispatch_16bit(const char* function, DType dtype, const Body& body) {
  if (dtype == DType::kBFloat16) return body(BFloat16{});
  if (dtype == DType::kFloat16) return body(Float16{});
  throw ArgumentError(concat(function, ": x is not of a 16-bit type; use float16 or bfloat16"));
}

inline bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

}  // namespace fastpeft::cuda
