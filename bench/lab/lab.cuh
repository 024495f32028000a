// What the lab's programs share: data, a decoded weight, cuBLAS, and timing by graph replays.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <dlfcn.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "cuda/device/launch.cuh"
#include "cuda/device/numbers.cuh"
#include "fastpeft/nf4.h"
#include "fastpeft/nf4_linear.h"

using namespace fastpeft;
using namespace fastpeft::cuda;

#define CK FASTPEFT_CUDA_CHECK

// --- data ------------------------------------------------------------------------------------------------------------
__host__ __device__ inline uint32_t hash(uint32_t x) {
  x ^= x >> 16, x *= 0x7feb352du, x ^= x >> 15, x *= 0x846ca68bu, x ^= x >> 16;
  return x;
}
template <typename T>
__global__ void fill_normal(T* p, size_t count, uint32_t seed, float scale) {  // sum of four uniforms
  for (size_t i = blockIdx.x * size_t{256} + threadIdx.x; i < count; i += size_t{256} * gridDim.x) {
    const uint32_t a = hash(static_cast<uint32_t>(i) * 2 + seed), b = hash(a ^ 0x9e3779b9u);
    const float v = ((a & 0xffff) + (a >> 16) + (b & 0xffff) + (b >> 16)) * (1.0f / 65536.0f) - 2.0f;
    p[i] = from_float<T>(v * 1.7320508f * scale);
  }
}
static __global__ void fill_bytes(uint8_t* p, size_t count, uint32_t seed) {
  for (size_t i = blockIdx.x * size_t{256} + threadIdx.x; i < count; i += size_t{256} * gridDim.x) {
    p[i] = static_cast<uint8_t>(hash(static_cast<uint32_t>(i) + seed));
  }
}
template <typename T>
T* allocate(size_t count) {
  void* p;
  CK(cudaMalloc(&p, count * sizeof(T)));
  return static_cast<T*>(p);
}

struct Weight {
  NF4View view;
  void* decoded[2];  // by dtype: fp16, bf16; null until asked for
  int n, k;
};

inline Weight make_weight(int n, int k, int block_size, bool nested, uint32_t seed) {
  const int64_t numel = int64_t{n} * k, blocks = (numel + block_size - 1) / block_size, outer = (blocks + 255) / 256;
  uint8_t* codes = allocate<uint8_t>((numel + 1) / 2);
  fill_bytes<<<1024, 256>>>(codes, (numel + 1) / 2, seed);
  Weight w{{codes, nullptr, nullptr, nullptr, nullptr, numel, block_size}, {}, n, k};
  if (nested) {
    uint8_t* absmax = allocate<uint8_t>(blocks);
    fill_bytes<<<1024, 256>>>(absmax, blocks, seed + 1);
    std::vector<float> map(256), scales(outer);
    for (int i = 0; i < 256; ++i) map[i] = (i - 128) / 128.0f;
    for (int64_t i = 0; i < outer; ++i) scales[i] = 0.2f + 0.3f * (hash(seed + 7 * i) & 0xffff) / 65536.0f;
    const float offset = 0.9f;
    float *dmap = allocate<float>(256), *dscales = allocate<float>(outer), *doffset = allocate<float>(1);
    CK(cudaMemcpy(dmap, map.data(), 1024, cudaMemcpyHostToDevice));
    CK(cudaMemcpy(dscales, scales.data(), 4 * outer, cudaMemcpyHostToDevice));
    CK(cudaMemcpy(doffset, &offset, 4, cudaMemcpyHostToDevice));
    w.view.absmax = absmax, w.view.nested_absmax = dscales, w.view.nested_map = dmap, w.view.offset = doffset;
  } else {
    float* absmax = allocate<float>(blocks);
    fill_normal<<<1024, 256>>>(absmax, blocks, seed + 1, 1.0f);
    w.view.absmax = absmax;
  }
  return w;
}
inline void* decoded(Weight& w, DType dtype) {
  void*& to = w.decoded[dtype == DType::kBFloat16];
  if (to == nullptr) {
    to = allocate<uint16_t>(w.view.numel);
    cuda::nf4_dequantize({w.view, 0, w.view.numel, to, dtype}, {});
  }
  return to;
}
inline void release(Weight& w) {
  for (const void* p :
       {static_cast<const void*>(w.view.codes), w.view.absmax, static_cast<const void*>(w.view.nested_absmax),
        static_cast<const void*>(w.view.nested_map), static_cast<const void*>(w.view.offset),
        static_cast<const void*>(w.decoded[0]), static_cast<const void*>(w.decoded[1])}) {
    cudaFree(const_cast<void*>(p));
  }
}

inline void* g_workspace;
inline unsigned* g_counters;

struct Case {
  int m, n, k;
  bool transposed;
};
// --- time ------------------------------------------------------------------------------------------------------------
struct Contender {
  std::string name;
  std::function<void(int)> run;  // number i of a row of launches, for rotating what is read
  float us = 0;                  // median
};

// Graph replays, the contenders in turns.
inline void measure(std::vector<Contender>& list, int most_launches, cudaStream_t stream) {
  cudaEvent_t start, stop;
  CK(cudaEventCreate(&start));
  CK(cudaEventCreate(&stop));
  const auto timed = [&](const std::function<void()>& body) {
    CK(cudaEventRecord(start, stream));
    body();
    CK(cudaEventRecord(stop, stream));
    CK(cudaEventSynchronize(stop));
    float ms;
    CK(cudaEventElapsedTime(&ms, start, stop));
    return ms;
  };
  struct Replay {
    cudaGraphExec_t graph;
    int launches;
    std::vector<float> us;
  };
  std::vector<Replay> replays;
  for (const Contender& a : list) {
    a.run(0);
    CK(cudaStreamSynchronize(stream));
    const float ms = timed([&] {
      for (int i = 0; i < 3; ++i) a.run(i);
    });
    Replay r{nullptr, std::clamp(static_cast<int>(1.5f / (ms / 3)), 2, most_launches), {}};
    cudaGraph_t graph;
    CK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    for (int i = 0; i < r.launches; ++i) a.run(i);
    CK(cudaStreamEndCapture(stream, &graph));
    CK(cudaGraphInstantiate(&r.graph, graph, 0));
    CK(cudaGraphDestroy(graph));
    replays.push_back(r);
  }
  for (int round = 0; round < 5; ++round) {
    for (Replay& r : replays) r.us.push_back(1000 * timed([&] { CK(cudaGraphLaunch(r.graph, stream)); }) / r.launches);
  }
  for (size_t i = 0; i < list.size(); ++i) {
    std::sort(replays[i].us.begin(), replays[i].us.end());
    list[i].us = replays[i].us[2];
    CK(cudaGraphExecDestroy(replays[i].graph));
  }
  CK(cudaEventDestroy(start));
  CK(cudaEventDestroy(stop));
}

struct Cublas {
  void* handle = nullptr;
  int (*gemm_ex)(void*, int, int, int, int, int, const void*, const void*, int, int, const void*, int, int, const void*,
                 void*, int, int, int, int) = nullptr;
  Cublas(const char* path, cudaStream_t stream) {
    std::string dir(path);
    dir = dir.substr(0, dir.rfind('/'));
    for (const char* lt : {"/libcublasLt.so.13", "/libcublasLt.so.12"}) {
      if (dlopen((dir + lt).c_str(), RTLD_NOW | RTLD_GLOBAL)) break;
    }
    void* lib = dlopen(path, RTLD_NOW | RTLD_GLOBAL);
    if (lib == nullptr) {
      printf("no cuBLAS: %s\n", dlerror());
      exit(1);
    }
    reinterpret_cast<int (*)(void**)>(dlsym(lib, "cublasCreate_v2"))(&handle);
    reinterpret_cast<int (*)(void*, cudaStream_t)>(dlsym(lib, "cublasSetStream_v2"))(handle, stream);
    reinterpret_cast<int (*)(void*, void*, size_t)>(dlsym(lib, "cublasSetWorkspace_v2"))(
        handle, allocate<uint8_t>(64 << 20), 64 << 20);
    gemm_ex = reinterpret_cast<decltype(gemm_ex)>(dlsym(lib, "cublasGemmEx"));
  }
  void operator()(const Case& c, const void* x, const void* w, void* y) const {
    const float one = 1.0f, zero = 0.0f;
    const int out = c.transposed ? c.k : c.n, depth = c.transposed ? c.n : c.k;
    gemm_ex(handle, c.transposed ? 0 : 1, 0, out, c.m, depth, &one, w, CUDA_R_16BF, c.k, x, CUDA_R_16BF, depth, &zero,
            y, CUDA_R_16BF, out, 68, -1);
  }
};
