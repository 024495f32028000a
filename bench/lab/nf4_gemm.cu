// Checks and times the NF4 products of kernels.cuh: nf4_gemm [libcublas.so] [--only NAME] [--table FILE]
//
// Host checks come first. Each further item runs in a child process forked before CUDA is touched; when one faults or
// hangs, the next child goes on behind it. Results pass through a shared page: 0 not run, 1 running, 2 pass, 3 fail, 4
// crashed.
#include <dlfcn.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "host_checks.h"
#include "kernels.cuh"

using namespace lab;

static int* g_err = nullptr;  // host-mapped, see fail_if
static void report_waits() {
  if (!g_err) return;
  const char* names[] = {"",
                         "producer, empty stage",
                         "consumer, full stage",
                         "producer, decoded block",
                         "decoder, free slot",
                         "producer, last slots",
                         "consumer, partial sum",
                         "unit test",
                         "shared memory base"};
  for (int id = 1; id < kWaitIds; ++id) {
    volatile int* e = g_err + 4 * id;
    if (e[0]) printf("    stuck: %s: block %d thread %d, %d, %d\n", names[id], e[0] - 0x10000, e[1], e[2], e[3]);
  }
}
#define CK(call)                                                                              \
  do {                                                                                        \
    const cudaError_t e_ = (call);                                                            \
    if (e_ != cudaSuccess) {                                                                  \
      printf("    CUDA error at line %d: %s: %s\n", __LINE__, #call, cudaGetErrorString(e_)); \
      report_waits();                                                                         \
      fflush(stdout);                                                                         \
      _exit(3);                                                                               \
    }                                                                                         \
  } while (0)

static double now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + 1e-9 * t.tv_nsec;
}

// ---- numbers --------------------------------------------------------------------------------------------------------
static float bf2f(uint16_t v) {
  const uint32_t u = static_cast<uint32_t>(v) << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}
static uint16_t f2bf(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  if ((u & 0x7fffffff) > 0x7f800000) return 0x7fff;
  return static_cast<uint16_t>((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
LAB_HD uint32_t hash32(uint32_t x) {
  x ^= x >> 16, x *= 0x7feb352du, x ^= x >> 15, x *= 0x846ca68bu, x ^= x >> 16;
  return x;
}

LAB_DEV size_t grid_thread() { return blockIdx.x * static_cast<size_t>(blockDim.x) + threadIdx.x; }
LAB_DEV size_t grid_threads() { return static_cast<size_t>(gridDim.x) * blockDim.x; }
__global__ void fill_normal(uint16_t* p, size_t count, uint32_t seed) {  // sum of four uniforms, variance one
  for (size_t i = grid_thread(); i < count; i += grid_threads()) {
    const uint32_t a = hash32(static_cast<uint32_t>(i) * 2 + seed), b = hash32(a ^ 0x9e3779b9u);
    const float v = ((a & 0xffff) + (a >> 16) + (b & 0xffff) + (b >> 16)) * (1.0f / 65536.0f) - 2.0f;
    p[i] = __bfloat16_as_ushort(__float2bfloat16_rn(v * 1.7320508f));
  }
}
__global__ void fill_bytes(uint32_t* p, size_t words, uint32_t seed) {
  for (size_t i = grid_thread(); i < words; i += grid_threads()) p[i] = hash32(static_cast<uint32_t>(i) + seed);
}
// Reference: w in bf16, row-major, and a product with one thread an output, y[m, o] = sum_c x[m, c] w[o * so + c * sc].
__global__ void reference_decode(const Weight w, uint16_t* out) {
  for (size_t i = grid_thread(); i < static_cast<size_t>(w.n) * w.k; i += grid_threads()) {
    const size_t b = i / 64;
    const uint8_t byte = w.codes[i / 2];
    const float scale = __fadd_rn(__fmul_rn(w.nested_map[w.absmax[b]], w.nested_absmax[b >> 8]), w.offset);
    out[i] =
        __bfloat16_as_ushort(__float2bfloat16_rn(__fmul_rn(fastpeft::nf4_level(i & 1 ? byte & 15 : byte >> 4), scale)));
  }
}
__global__ void reference_product(const uint16_t* x, const uint16_t* w, size_t so, size_t sc, int out, int depth,
                                  float* y) {
  const int o = blockIdx.x * blockDim.x + threadIdx.x;
  if (o >= out) return;
  float sum = 0.0f;
  for (int c = 0; c < depth; ++c)
    sum = fmaf(__bfloat162float(__ushort_as_bfloat16(x[static_cast<size_t>(blockIdx.y) * depth + c])),
               __bfloat162float(__ushort_as_bfloat16(w[o * so + c * sc])), sum);
  y[static_cast<size_t>(blockIdx.y) * out + o] = sum;
}

// ---- memory and tensor maps -----------------------------------------------------------------------------------------
template <class T>
static std::vector<T> fetch(const T* p, size_t count) {
  std::vector<T> v(count);
  CK(cudaMemcpy(v.data(), p, count * sizeof(T), cudaMemcpyDeviceToHost));
  return v;
}
template <class T>
static T* alloc(size_t count) {
  void* p;
  CK(cudaMalloc(&p, count * sizeof(T)));
  return static_cast<T*>(p);
}

using EncodeTiled = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                                 const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                                 CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
static EncodeTiled g_encode = nullptr;
// bf16 [rows, cols] with `pitch` elements from row to row, boxes of 64 x box_rows, 128-byte swizzle.
static CUtensorMap tensor_map(const void* p, uint64_t cols, uint64_t rows, uint64_t pitch, uint32_t box_rows) {
  CUtensorMap map;
  const cuuint64_t dims[2] = {cols, rows}, strides[1] = {pitch * 2};
  const cuuint32_t box[2] = {64, box_rows}, steps[2] = {1, 1};
  const CUresult r = g_encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<void*>(p), dims, strides, box,
                              steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                              CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (r != CUDA_SUCCESS) {
    printf("    cuTensorMapEncodeTiled: %d (cols %llu rows %llu pitch %llu box rows %u)\n", r, (unsigned long long)cols,
           (unsigned long long)rows, (unsigned long long)pitch, box_rows);
    fflush(stdout);
    _exit(3);
  }
  return map;
}
static CUtensorMap act_map(const void* p, int m, int depth) { return tensor_map(p, depth, m, depth, 128); }
static CUtensorMap out_map(const void* p, int m, int out, int pitch) { return tensor_map(p, out, m, pitch, 64); }
static CUtensorMap dense_map(bool backward, const void* p, int rows, int cols) {
  return tensor_map(p, cols, rows, cols, backward ? 64 : 128);
}

static int g_sms = 132;
static void init_cuda() {
  CK(cudaSetDevice(0));
  CK(cudaFree(nullptr));
  cudaDriverEntryPointQueryResult q;
  void* fn = nullptr;
  CK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &fn, 12000, cudaEnableDefault, &q));
  if (!fn || q != cudaDriverEntryPointSuccess) {
    printf("    no cuTensorMapEncodeTiled\n");
    _exit(3);
  }
  g_encode = reinterpret_cast<EncodeTiled>(fn);
  CK(cudaHostAlloc(&g_err, 4096, cudaHostAllocMapped));
  memset(g_err, 0, 4096);
  cudaDeviceProp prop;
  CK(cudaGetDeviceProperties(&prop, 0));
  g_sms = prop.multiProcessorCount;
  printf("  device %s, %d SMs, L2 %d MB\n", prop.name, g_sms, prop.l2CacheSize >> 20);
}

// ---- launches -------------------------------------------------------------------------------------------------------
struct Variant {
  const char* name;
  bool ring;
  int cluster, slots, group, split;
  bool publish_only = false, plain_launch = false;
  Limits limits() const {
    Limits l;
    l.sms = g_sms, l.slots = slots, l.group = group, l.split = split;
    return l;
  }
};
// A variant's plan for a product; slots only ever shorten the ring.
static Plan plan_of(const Variant& v, bool backward, int m, int n, int k) {
  return make_plan(m, backward ? k : n, backward ? n : k, v.cluster, v.limits());
}

static bool g_cooperative = true;
template <bool kRing, bool kBackward, int kCluster>
static void launch(const CUtensorMap& x, const CUtensorMap& w, const CUtensorMap& y, const Params& p,
                   cudaStream_t stream, bool plain) {
  auto kernel = gemm<kRing, kBackward, kCluster>;
  static bool ready = false;
  if (!ready) CK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSmemBytes));
  ready = true;
  cudaLaunchAttribute attr[2];
  int attrs = 0;
  if (kCluster > 1) {
    attr[attrs].id = cudaLaunchAttributeClusterDimension;
    attr[attrs].val.clusterDim.x = kCluster, attr[attrs].val.clusterDim.y = 1, attr[attrs++].val.clusterDim.z = 1;
  }
  // Blocks that wait for each other must all be resident. A plain launch promises that only while nothing else runs.
  const bool cooperative = g_cooperative && !plain && (kRing || p.plan.split > 1);
  if (cooperative) attr[attrs].id = cudaLaunchAttributeCooperative, attr[attrs++].val.cooperative = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(p.plan.grid), config.blockDim = dim3(kGemmThreads);
  config.dynamicSmemBytes = kSmemBytes, config.stream = stream;
  config.attrs = attr, config.numAttrs = attrs;
  const uint32_t ring = kHeaderBytes + static_cast<uint32_t>(partial_bytes(p.plan));
  const cudaError_t e = cudaLaunchKernelEx(&config, kernel, x, w, y, p, ring);
  if (e == cudaSuccess || !cooperative) {
    CK(e);
    return;
  }
  printf("  cooperative launch (cluster %d): %s; going on with plain launches\n", kCluster, cudaGetErrorString(e));
  cudaGetLastError();
  g_cooperative = false, config.numAttrs = attrs - 1;
  CK(cudaLaunchKernelEx(&config, kernel, x, w, y, p, ring));
}
using Launch = void (*)(const CUtensorMap&, const CUtensorMap&, const CUtensorMap&, const Params&, cudaStream_t, bool);
static Launch launch_of(bool ring, bool backward, int cluster) {
  static const Launch table[8] = {launch<false, false, 1>, launch<false, false, 2>, launch<false, true, 1>,
                                  launch<false, true, 2>,  launch<true, false, 1>,  launch<true, false, 2>,
                                  launch<true, true, 1>,   launch<true, true, 2>};
  return table[ring * 4 + backward * 2 + cluster - 1];
}
static uint8_t* workspace() {  // 32 MB and a guard
  static uint8_t* p = nullptr;
  if (!p) {
    p = alloc<uint8_t>((32u << 20) + 4096);
    CK(cudaMemset(p, 0xFF, (32u << 20) + 4096));
    CK(cudaMemset(p, 0, kHeaderBytes));
  }
  return p;
}
static Params params_of(const Plan& plan, const Weight& w, uint32_t* stats = nullptr, bool publish_only = false) {
  return {plan, w, workspace(), stats, g_err, publish_only};
}

// Two launches a slab: as much of w as the workspace holds goes to row-major bf16, then the plain kernel reads it from
// L2.
static int slab_strips(int out, int depth) {
  const int strips = ceil_div(out, kTileOut);
  const int fit = std::max<int>(1, ((32u << 20) - kHeaderBytes) / (static_cast<size_t>(kTileOut) * depth * 2));
  return ceil_div(strips, ceil_div(strips, fit));
}
static void run_slabs(bool backward, const Weight& w, const CUtensorMap& x, uint16_t* y, int m, cudaStream_t stream) {
  const int out = backward ? w.k : w.n, depth = backward ? w.n : w.k, each = slab_strips(out, depth) * kTileOut;
  uint16_t* slab = reinterpret_cast<uint16_t*>(workspace() + kHeaderBytes);
  for (int out0 = 0; out0 < out; out0 += each) {
    const int size = std::min(each, out - out0), rows = backward ? w.n : size, blocks = (backward ? size : w.k) / 64;
    const int pieces = rows * blocks * 8;
    dequantise_slab<<<ceil_div(pieces, kSlabThreads * kSlabPieces), kSlabThreads, 0, stream>>>(
        w, backward ? 0 : out0, rows, backward ? out0 / 64 : 0, blocks, reinterpret_cast<uint4*>(slab));
    Limits limits;
    limits.sms = g_sms, limits.split = 1;
    const Plan plan = make_plan(m, size, depth, 1, limits);
    launch_of(false, backward, 1)(x, dense_map(backward, slab, rows, blocks * 64), out_map(y + out0, m, size, out),
                                  params_of(plan, w), stream, false);
  }
}

// ---- unit kernels ---------------------------------------------------------------------------------------------------
__global__ void unit_tma(const __grid_constant__ CUtensorMap map, int c0, int c1, const uint8_t* plain, uint8_t* out,
                         int* err) {
  __shared__ __align__(1024) uint8_t buf[16384];
  __shared__ __align__(8) uint64_t bar;
  if (threadIdx.x == 0) {
    mbar_init(smem_u32(&bar), 1);
    mbar_init_fence();
    fence_async_shared();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    mbar_arrive_expect(smem_u32(&bar), 16384);
    if (plain)
      bulk_load(smem_u32(buf), plain, 16384, smem_u32(&bar));
    else
      tma_load(smem_u32(buf), &map, smem_u32(&bar), c0, c1);
  }
  mbar_wait(smem_u32(&bar), 0, err, kWaitUnit, 0);
  for (int i = threadIdx.x; i < 16384; i += blockDim.x) out[i] = buf[i];
}
// d[64, 256] = a b^T over 64 of depth; a is [64, 64] of rows x depth or, kMnMajor, of depth x rows.
template <bool kMnMajor>
__global__ void __launch_bounds__(128, 1) unit_wgmma(const __grid_constant__ CUtensorMap map_a,
                                                     const __grid_constant__ CUtensorMap map_b, float* out, int* err) {
  __shared__ __align__(1024) uint8_t sb[32768];
  __shared__ __align__(1024) uint8_t sa[8192];
  __shared__ __align__(8) uint64_t bar;
  const int tid = threadIdx.x, warp = tid >> 5, g = (tid & 31) >> 2, t = tid & 3;
  if (tid == 0) {
    mbar_init(smem_u32(&bar), 1);
    mbar_init_fence();
    fence_async_shared();
  }
  __syncthreads();
  if (tid == 0) {
    mbar_arrive_expect(smem_u32(&bar), 32768 + 8192);
    tma_load(smem_u32(sb), &map_b, smem_u32(&bar), 0, 0);
    tma_load(smem_u32(sb) + 16384, &map_b, smem_u32(&bar), 0, 128);
    tma_load(smem_u32(sa), &map_a, smem_u32(&bar), 0, 0);
  }
  mbar_wait(smem_u32(&bar), 0, err, kWaitUnit, 1);
  __syncthreads();
  float d[128];
  const uint64_t da = make_desc(smem_u32(sa)), db = make_desc(smem_u32(sb));
  wgmma_fence();
#pragma unroll
  for (int q = 0; q < 4; ++q) wgmma<kMnMajor>(d, da + kDescStep<kMnMajor> * q, db + kDescStep<false> * q, q > 0);
  wgmma_commit();
  wgmma_wait<0>();
#pragma unroll
  for (int q = 0; q < 128; ++q) asm volatile("" : "+f"(d[q])::"memory");
#pragma unroll
  for (int j = 0; j < 32; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) out[(16 * warp + g + 8 * (i >> 1)) * 256 + 8 * j + 2 * t + (i & 1)] = d[4 * j + i];
}
__global__ void unit_stage(uint16_t* out) {  // value of (row, token) = row + 64 (token & 3), exact in bf16
  __shared__ __align__(1024) uint8_t buf[8192];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  float d[128];
#pragma unroll
  for (int j = 0; j < 32; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) d[4 * j + i] = 16 * warp + g + 8 * (i >> 1) + 64 * ((8 * j + 2 * t + (i & 1)) & 3);
#pragma unroll
  for (int q = 0; q < 4; ++q) {
    __syncthreads();
    stage_quarter(d, q, smem_u32(buf), warp, lane);
    __syncthreads();
    for (int i = threadIdx.x; i < 4096; i += 128) out[q * 4096 + i] = reinterpret_cast<uint16_t*>(buf)[i];
  }
}
template <bool kBackward>
__global__ void unit_decode(const Weight w, Block b, uint8_t* slot) {  // a warp an item
  __shared__ float map[256];
  map[threadIdx.x] = w.nested_map[threadIdx.x];
  __syncthreads();
  Loaded v;
  load_item<kBackward>(w, b, threadIdx.x >> 5, threadIdx.x & 31, v);
  store_item<kBackward>(v, smem_u32(map), w.offset, threadIdx.x >> 5, threadIdx.x & 31, slot);
}

static Weight make_weight(int n, int k, uint32_t seed) {
  Weight q = {n, k, nullptr, nullptr, nullptr, nullptr, 0.06f};
  const size_t bytes = static_cast<size_t>(n) * k / 2, blocks = static_cast<size_t>(n) * (k / 64),
               groups = (blocks + 255) / 256;
  uint8_t *codes = alloc<uint8_t>(bytes), *absmax = alloc<uint8_t>((blocks + 15) / 16 * 16);
  float *map = alloc<float>(256), *nested = alloc<float>(groups);
  fill_bytes<<<264, 256>>>(reinterpret_cast<uint32_t*>(codes), bytes / 4, seed);
  fill_bytes<<<264, 256>>>(reinterpret_cast<uint32_t*>(absmax), (blocks + 15) / 16 * 4, seed * 3 + 1);
  std::vector<float> host_map(256), host_nested(groups);
  for (int i = 0; i < 256; ++i) {
    const float v = (2 * i - 255) / 255.0f;
    host_map[i] = v * (0.3f + 0.7f * fabsf(v));
  }
  for (size_t i = 0; i < groups; ++i) host_nested[i] = 0.02f + 0.03f * (hash32(seed + 7 * i) / 4294967296.0f);
  CK(cudaMemcpy(map, host_map.data(), 1024, cudaMemcpyHostToDevice));
  CK(cudaMemcpy(nested, host_nested.data(), groups * 4, cudaMemcpyHostToDevice));
  CK(cudaGetLastError());
  q.codes = codes, q.absmax = absmax, q.nested_map = map, q.nested_absmax = nested;
  return q;
}
static void free_weight(const Weight& q) {
  for (const void* p : {static_cast<const void*>(q.codes), static_cast<const void*>(q.absmax),
                        static_cast<const void*>(q.nested_map), static_cast<const void*>(q.nested_absmax)})
    CK(cudaFree(const_cast<void*>(p)));
}

// ---- checks ---------------------------------------------------------------------------------------------------------
static bool test_units() {
  bool ok = true;
  {
    constexpr int kCols = 192, kRows = 200;
    uint8_t *src = alloc<uint8_t>(kCols * kRows * 2), *dst = alloc<uint8_t>(16384);
    fill_bytes<<<32, 256>>>(reinterpret_cast<uint32_t*>(src), kCols * kRows / 2, 5);
    for (int plain = 0; plain < 2; ++plain) {
      CK(cudaMemset(dst, 0xAA, 16384));
      unit_tma<<<1, 128>>>(tensor_map(src, kCols, kRows, kCols, 128), 64, 100, plain ? src : nullptr, dst, g_err);
      CK(cudaDeviceSynchronize());
      const auto s = fetch(src, kCols * kRows * 2), d = fetch(dst, 16384);
      long bad = 0;
      for (int r = 0; r < 128; ++r)
        for (int b = 0; b < 128; ++b) {
          const uint8_t want = plain ? s[r * 128 + b] : 100 + r < kRows ? s[(100 + r) * kCols * 2 + 128 + b] : 0;
          bad += d[plain ? r * 128 + b : swizzle(r, b)] != want;
        }
      ok &= check(plain ? "bulk copy of 16 KB" : "TMA 64 x 128, 128-byte swizzle, rows past the end", bad);
    }
  }
  {
    uint16_t *a = alloc<uint16_t>(64 * 64), *b = alloc<uint16_t>(256 * 64);
    float* out = alloc<float>(64 * 256);
    std::vector<uint16_t> ha(64 * 64), hb(256 * 64);
    for (size_t i = 0; i < ha.size(); ++i) ha[i] = f2bf(static_cast<int>(hash32(i) % 17) - 8);
    for (size_t i = 0; i < hb.size(); ++i) hb[i] = f2bf(static_cast<int>(hash32(i + 99999) % 17) - 8);
    CK(cudaMemcpy(a, ha.data(), ha.size() * 2, cudaMemcpyHostToDevice));
    CK(cudaMemcpy(b, hb.data(), hb.size() * 2, cudaMemcpyHostToDevice));
    const CUtensorMap ma = tensor_map(a, 64, 64, 64, 64), mb = act_map(b, 256, 64);
    for (int mn = 0; mn < 2; ++mn) {
      CK(cudaMemset(out, 0xFF, 64 * 256 * 4));
      if (mn)
        unit_wgmma<true><<<1, 128>>>(ma, mb, out, g_err);
      else
        unit_wgmma<false><<<1, 128>>>(ma, mb, out, g_err);
      CK(cudaDeviceSynchronize());
      const auto got = fetch(out, 64 * 256);
      long bad = 0;
      for (int r = 0; r < 64; ++r)
        for (int c = 0; c < 256; ++c) {
          float want = 0;
          for (int k = 0; k < 64; ++k) want += bf2f(ha[mn ? k * 64 + r : r * 64 + k]) * bf2f(hb[c * 64 + k]);
          if (!(got[r * 256 + c] == want) && bad++ < 4)
            printf("    d[%d,%d]: got %g want %g\n", r, c, got[r * 256 + c], want);
        }
      ok &= check(mn ? "wgmma m64n256k16 x 4, first operand MN-major" : "wgmma m64n256k16 x 4, K-major", bad);
    }
    uint16_t* staged = alloc<uint16_t>(4 * 4096);
    unit_stage<<<1, 128>>>(staged);
    CK(cudaDeviceSynchronize());
    const auto got = fetch(staged, 4 * 4096);
    long bad = 0;
    for (int token = 0; token < 256; ++token)
      for (int o = 0; o < 64; ++o)
        bad += bf2f(got[(token / 64) * 4096 + swizzle(token & 63, o * 2) / 2]) != o + 64 * (token & 3);
    ok &= check("epilogue staging (stmatrix.trans)", bad);
  }
  const Weight q = make_weight(200, 320, 11);
  uint16_t *dense = alloc<uint16_t>(200 * 320), *slot = alloc<uint16_t>(kSlotBytes / 2);
  reference_decode<<<264, 256>>>(q, dense);
  CK(cudaDeviceSynchronize());
  const auto want = fetch(dense, 200 * 320);
  {
    const auto codes = fetch(q.codes, 200 * 160), absmax = fetch(q.absmax, 1000);
    const auto map = fetch(q.nested_map, 256), nested = fetch(q.nested_absmax, 4);
    long bad = 0;
    for (int i = 0; i < 200 * 320; ++i) {
      volatile float product = map[absmax[i / 64]] * nested[i / 64 >> 8];  // volatile: no fused multiply-add
      volatile float scale = product + q.offset;
      volatile float v = fastpeft::kNF4Levels[i & 1 ? codes[i / 2] & 15 : codes[i / 2] >> 4] * scale;
      bad += f2bf(v) != want[i] || scale <= 0;
    }
    ok &= check("reference decode on the device against the host", bad);
  }
  for (int backward = 0; backward < 2; ++backward) {
    long bad = 0;
    for (int strip = 0; strip < (backward ? 3 : 2); ++strip)
      for (int chunk = 0; chunk < (backward ? 1 : 2); ++chunk) {
        CK(cudaMemset(slot, 0xFF, kSlotBytes));
        if (backward)
          unit_decode<true><<<1, 256>>>(q, {strip, chunk}, reinterpret_cast<uint8_t*>(slot));
        else
          unit_decode<false><<<1, 256>>>(q, {strip, chunk}, reinterpret_cast<uint8_t*>(slot));
        CK(cudaDeviceSynchronize());
        const auto got = fetch(slot, kSlotBytes / 2);
        for (int r = 0; r < (backward ? 256 : 128); ++r)
          for (int c = 0; c < (backward ? 128 : 256); ++c) {
            const int row = r + (backward ? chunk * 256 : strip * 128),
                      col = c + (backward ? strip * 128 : chunk * 256);
            const uint32_t at = backward
                                    ? (r / 64) * kTileBytes + (c / 64) * (kTileBytes / 2) + swizzle(r % 64, c % 64 * 2)
                                    : (c / 64) * kTileBytes + swizzle(r, c % 64 * 2);
            const bool inside = row < 200 && col < 320;
            const uint16_t v = got[at / 2];
            bad += inside ? v != want[row * 320 + col] : (v & 0x7fff) != 0;
          }
      }
    ok &= check(
        backward ? "decoded blocks, backward, also past both ends" : "decoded blocks, forward, also past both ends",
        bad);
  }
  return ok;
}

struct Case {  // inputs and reference of a shape and direction, kept for the process
  Weight q;
  uint16_t *x, *dense, *y;
  std::vector<float> want;
};
constexpr size_t kGuard = 4096;  // elements past the end of y that must stay poisoned
static Case& get_case(bool backward, int m, int n, int k) {
  static std::map<std::array<int, 4>, Case> cases;
  Case& c = cases[{backward, m, n, k}];
  if (!c.want.empty()) return c;
  const int out = backward ? k : n, depth = backward ? n : k;
  const size_t count = static_cast<size_t>(m) * out;
  c.q = make_weight(n, k, 1000 + m);
  c.x = alloc<uint16_t>(static_cast<size_t>(m) * depth), c.dense = alloc<uint16_t>(static_cast<size_t>(n) * k),
  c.y = alloc<uint16_t>(count + kGuard);
  float* ref = alloc<float>(count);
  fill_normal<<<264, 256>>>(c.x, static_cast<size_t>(m) * depth, 77 + n);
  reference_decode<<<264, 256>>>(c.q, c.dense);
  reference_product<<<dim3((out + 127) / 128, m), 128>>>(c.x, c.dense, backward ? 1 : k, backward ? k : 1, out, depth,
                                                         ref);
  CK(cudaGetLastError());
  CK(cudaDeviceSynchronize());
  c.want = fetch(ref, count);
  CK(cudaFree(ref));
  return c;
}

constexpr int kAll = kMaxSlots;
static const Variant kDense1 = {"v0/1", false, 1, kAll, 16, 8}, kDense2 = {"v0/2", false, 2, kAll, 16, 8};
static const Variant kSlabs = {"slabs", false, 1, 0, 16, 1};  // two launches a slab
static const Variant kChecked[] = {kDense1,
                                   kDense2,
                                   kSlabs,
                                   {"c3/1", true, 1, kAll, 16, 8},
                                   {"c3/2", true, 2, kAll, 16, 8},
                                   {"c3/1-short", true, 1, 5, 3, 8},
                                   {"c3/2-short", true, 2, 6, 3, 8}};  // rings of almost nothing
constexpr int kCheckedCount = sizeof(kChecked) / sizeof(kChecked[0]);

static void run_variant(const Variant& v, bool backward, const Weight& q, const uint16_t* dense, const uint16_t* x,
                        uint16_t* y, int m, cudaStream_t stream, uint32_t* stats = nullptr) {
  const int out = backward ? q.k : q.n, depth = backward ? q.n : q.k;
  const CUtensorMap mx = act_map(x, m, depth), my = out_map(y, m, out, out);
  if (v.slots == 0) {
    run_slabs(backward, q, mx, y, m, stream);
    return;
  }
  const Plan plan = plan_of(v, backward, m, q.n, q.k);
  launch_of(v.ring, backward, v.cluster)(mx, v.ring ? mx : dense_map(backward, dense, q.n, q.k), my,
                                         params_of(plan, q, stats, v.publish_only), stream, v.plain_launch);
}

static bool test_product(const Variant& v, bool backward, bool plain_is_right) {
  // Tokens, n, k: single tiles, ragged ends, splits (even, ragged, by eight), several waves and groups, depths that end
  // within a chunk.
  const int shapes[][3] = {{256, 128, 64},    {256, 128, 256},    {300, 200, 192},   {300, 200, 1024},
                           {64, 1024, 2048},  {1024, 1024, 1024}, {257, 4096, 4096}, {700, 1112, 832},
                           {2304, 2176, 320}, {5000, 1112, 832}};
  bool all = true;
  double all_worst = 0, all_rms = 0;
  long all_differ = 0;
  int count = 0;
  for (auto& s : shapes) {
    const int m = s[0], n = s[1], k = s[2], out = backward ? k : n;
    Case& c = get_case(backward, m, n, k);
    const size_t y_count = c.want.size();
    auto go = [&](const Variant& which) {
      CK(cudaMemset(c.y, 0xFF, (y_count + kGuard) * 2));
      CK(cudaMemset(workspace() + kHeaderBytes, 0xFF,
                    (32u << 20) - kHeaderBytes));  // a read ahead of its write gives NaN
      run_variant(which, backward, c.q, c.dense, c.x, c.y, m, nullptr);
      CK(cudaGetLastError());
      CK(cudaDeviceSynchronize());
      return fetch(c.y, y_count + kGuard);
    };
    const auto got = go(v), again = go(v);  // a result that moves is a race
    double sq = 0, err_sq = 0, worst = 0;
    long nan = 0, wrong = 0, moved = 0, spilt = 0;
    for (size_t i = 0; i < y_count; ++i) sq += static_cast<double>(c.want[i]) * c.want[i];
    const double rms = sqrt(sq / y_count);
    for (size_t i = 0; i < y_count; ++i) {
      const double value = bf2f(got[i]), e = fabs(value - c.want[i]);
      moved += got[i] != again[i];
      if (e <= 1e30)
        err_sq += e * e, worst = std::max(worst, e);
      else
        ++nan;
      if (!(e <= 0.02 * rms + 0.008 * fabs(c.want[i])) && wrong++ < 4)
        printf("    y[%zu,%zu]: got %g want %g (rms %g)\n", i / out, i % out, value, c.want[i], rms);
    }
    for (size_t i = y_count; i < y_count + kGuard; ++i) spilt += got[i] != 0xFFFF;
    long dirty = 0;  // the counters must be zero again, and nothing may lie behind the workspace's end
    const auto header = fetch(reinterpret_cast<const uint32_t*>(workspace()), kHeaderBytes / 4);
    for (uint32_t word : header) dirty += word != 0;
    for (uint8_t byte : fetch(workspace() + (32u << 20), 4096)) dirty += byte != 0xFF;
    long differ = 0;  // elements that are not, bit for bit, the plain kernel's under the same plan
    if (v.ring && plain_is_right) {
      Variant plain = v;
      plain.ring = false;
      const auto dense = go(plain);
      for (size_t i = 0; i < y_count; ++i) differ += dense[i] != got[i];
    }
    const bool ok = wrong == 0 && nan == 0 && moved == 0 && spilt == 0 && dirty == 0 && differ == 0;
    if (!ok)
      printf(
          "  m %d n %d k %d FAIL: max|e|/rms %.2e, rms(e)/rms %.2e, nan %ld, wrong %ld, moved %ld, past the end %ld, "
          "dirty words %ld, differs from plain %ld of %zu\n",
          m, n, k, worst / rms, sqrt(err_sq / y_count) / rms, nan, wrong, moved, spilt, dirty, differ, y_count);
    all &= ok, ++count;
    all_worst = std::max(all_worst, worst / rms), all_rms = std::max(all_rms, sqrt(err_sq / y_count) / rms),
    all_differ += differ;
  }
  printf("  %d shapes %s: max|e|/rms %.2e, rms(e)/rms %.2e%s\n", count, all ? "PASS" : "FAIL", all_worst, all_rms,
         v.ring
             ? plain_is_right ? ", compared with the plain kernel bit for bit" : ", not compared with the plain kernel"
             : "");
  return all;
}

static bool test_graph() {  // captured once, replayed three times
  const int m = 700, n = 1112, k = 4096;
  bool ok = true;
  for (int backward = 0; backward < 2; ++backward) {
    Case& c = get_case(backward, m, n, k);
    const size_t count = c.want.size();
    run_variant(kChecked[3], backward, c.q, c.dense, c.x, c.y, m, nullptr);
    CK(cudaDeviceSynchronize());
    const auto want = fetch(c.y, count);
    CK(cudaMemset(c.y, 0xFF, count * 2));
    CK(cudaDeviceSynchronize());
    cudaStream_t stream;
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    CK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    CK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    run_variant(kChecked[3], backward, c.q, c.dense, c.x, c.y, m, stream);
    CK(cudaStreamEndCapture(stream, &graph));
    CK(cudaGraphInstantiate(&exec, graph, 0));
    for (int i = 0; i < 3; ++i) CK(cudaGraphLaunch(exec, stream));
    CK(cudaStreamSynchronize(stream));
    const auto got = fetch(c.y, count);
    long bad = 0;
    for (size_t i = 0; i < count; ++i) bad += got[i] != want[i];
    ok &= check(backward ? "backward in a graph, replayed" : "forward in a graph, replayed", bad);
  }
  return ok;
}

// ---- cuBLAS through dlopen ------------------------------------------------------------------------------------------
struct Cublas {
  void* handle = nullptr;
  int (*create)(void**) = nullptr;
  int (*set_stream)(void*, cudaStream_t) = nullptr;
  int (*gemm_ex)(void*, int, int, int, int, int, const void*, const void*, int, int, const void*, int, int, const void*,
                 void*, int, int, int, int) = nullptr;
  bool open(const char* path) {
    void* lib = nullptr;
    for (const char* name : {path, "libcublas.so.13", "libcublas.so.12"}) {
      if (!name || !*name) continue;
      if (strchr(name, '/')) {  // its sibling first: the loader may not look there
        std::string dir(name);
        dir = dir.substr(0, dir.rfind('/'));
        for (const char* lt : {"/libcublasLt.so.13", "/libcublasLt.so.12"})
          if (dlopen((dir + lt).c_str(), RTLD_NOW | RTLD_GLOBAL)) break;
      }
      if ((lib = dlopen(name, RTLD_NOW | RTLD_GLOBAL))) break;
      printf("  dlopen %s: %s\n", name, dlerror());
    }
    if (!lib) return false;
    create = reinterpret_cast<decltype(create)>(dlsym(lib, "cublasCreate_v2"));
    set_stream = reinterpret_cast<decltype(set_stream)>(dlsym(lib, "cublasSetStream_v2"));
    gemm_ex = reinterpret_cast<decltype(gemm_ex)>(dlsym(lib, "cublasGemmEx"));
    return create && set_stream && gemm_ex && create(&handle) == 0;
  }
  // y[m, n] = x[m, k] w[n, k]^T, or backward dx[m, k] = dy[m, n] w[n, k]; all row-major. 68: CUBLAS_COMPUTE_32F.
  int run(bool backward, int m, int n, int k, const void* act, const void* w, void* y) {
    const float one = 1.0f, zero = 0.0f;
    if (!backward)
      return gemm_ex(handle, 1, 0, n, m, k, &one, w, CUDA_R_16BF, k, act, CUDA_R_16BF, k, &zero, y, CUDA_R_16BF, n, 68,
                     -1);
    return gemm_ex(handle, 0, 0, k, m, n, &one, w, CUDA_R_16BF, k, act, CUDA_R_16BF, n, &zero, y, CUDA_R_16BF, k, 68,
                   -1);
  }
};

// ---- timing ---------------------------------------------------------------------------------------------------------
static const Variant kTimed[] = {
    kDense1,
    kDense2,
    {"v0/1-whole", false, 1, kAll, 16, 1},
    kSlabs,
    {"c3/1", true, 1, kAll, 16, 8},
    {"c3/2", true, 2, kAll, 16, 8},
    {"c3/1-4MB", true, 1, 64, 16, 8},
    {"c3/1-8MB", true, 1, 128, 16, 8},
    {"c3/1-16MB", true, 1, 256, 16, 8},
    {"c3/1-g8", true, 1, kAll, 8, 8},
    {"c3/1-whole", true, 1, kAll, 16, 1},
    {"c3/1-plain", true, 1, kAll, 16, 8, false, true},  // not a cooperative launch
    {"c3/1-null", true, 1, kAll, 16, 8, true}};         // what the protocol costs without the decoding

static bool test_timing(const char* cublas_path, const char* table_path,
                        const std::function<bool(const Variant&, bool)>& usable) {
  const double start = now();
  Cublas blas;
  const bool have = blas.open(cublas_path);
  if (!have) printf("  no cuBLAS\n");
  cudaStream_t stream;
  CK(cudaStreamCreate(&stream));
  if (have) blas.set_stream(blas.handle, stream);
  cudaEvent_t e0, e1;
  CK(cudaEventCreate(&e0));
  CK(cudaEventCreate(&e1));
  FILE* table = table_path ? fopen(table_path, "w") : nullptr;
  if (table)
    fprintf(table, "direction\tn\tk\tm\tcontender\tus\tmin_us\tmax_us\ttflops\tcycles_a_step\tempty\tready\tslot\n");
  constexpr int kStatBlocks = 256;
  uint32_t* stats = alloc<uint32_t>(kStatWords * kStatBlocks);
  const size_t act_count = static_cast<size_t>(8192) * 14336;
  uint16_t *act = alloc<uint16_t>(act_count), *y = alloc<uint16_t>(act_count);
  fill_normal<<<1024, 256>>>(act, act_count, 3);
  CK(cudaDeviceSynchronize());
  if (have) {  // cuBLAS's argument order, checked once each way
    const Weight q = make_weight(256, 128, 5);
    uint16_t* dense = alloc<uint16_t>(256 * 128);
    float* ref = alloc<float>(64 * 256);
    reference_decode<<<64, 256>>>(q, dense);
    for (int backward = 0; backward < 2; ++backward) {
      const int out = backward ? 128 : 256, depth = backward ? 256 : 128;
      reference_product<<<dim3(2, 64), 128>>>(act, dense, backward ? 1 : 128, backward ? 128 : 1, out, depth, ref);
      CK(cudaDeviceSynchronize());
      const int status = blas.run(backward, 64, 256, 128, act, dense, y);
      CK(cudaDeviceSynchronize());
      const auto a = fetch(ref, 64 * out);
      const auto b = fetch(y, 64 * out);
      long bad = status != 0;
      for (int i = 0; i < 64 * out; ++i) bad += !(fabs(bf2f(b[i]) - a[i]) <= 0.01f + 0.01f * fabsf(a[i]));
      check(backward ? "cuBLAS backward is the same product" : "cuBLAS forward is the same product", bad);
    }
    free_weight(q);
  }
  printf(
      "  direction n k m | cuBLAS | contender us (its time over cuBLAS's; cycles a step, 1024 is the tensor cores' "
      "own; share of the producer's time\n"
      "  waiting for a stage and for a decoded block, of a decoder's waiting for a slot)\n");
  struct Row {
    bool backward;
    int n, k, m;
    float dense_us, us;
    const char* name;
  };
  std::vector<Row> rows;
  const int nks[][2] = {{4096, 4096}, {14336, 4096}, {4096, 14336}, {28672, 8192}},
            ms[] = {1024, 2048, 4096, 8192, 512};
  for (auto& nk : nks) {
    const int n = nk[0], k = nk[1];
    const size_t weights = static_cast<size_t>(n) * k;
    // Enough copies that no operand comes from L2 because the last launch left it there.
    const int copies = std::max<int>(2, (120u << 20) / (weights / 2)),
              dense_copies = std::max<int>(2, (130u << 20) / (weights * 2));
    std::vector<Weight> q;
    std::vector<uint16_t*> dense;
    for (int c = 0; c < std::max(copies, dense_copies); ++c) q.push_back(make_weight(n, k, 100 + c * 12345));
    for (int c = 0; c < dense_copies; ++c) {
      dense.push_back(alloc<uint16_t>(weights));
      reference_decode<<<1056, 256>>>(q[c], dense[c]);
    }
    CK(cudaDeviceSynchronize());
    for (int m : ms) {
      if (static_cast<size_t>(m) * std::max(n, k) > act_count) continue;
      for (int backward = 0; backward < 2; ++backward) {
        if (now() - start > 9.5) {
          printf("  (out of time before %s n %d k %d m %d)\n", backward ? "bwd" : "fwd", n, k, m);
          continue;
        }
        struct Contender {
          std::string name;
          const Variant* variant;  // null: cuBLAS
          std::vector<float> us;
          int launches = 1;
        };
        std::vector<Contender> list;
        if (have) list.push_back({"cublas", nullptr});
        for (const Variant& v : kTimed) {
          if (!usable(v, backward)) continue;
          const bool whole = v.split == 1 && v.slots == kAll;  // worth a row only where the default splits
          if (whole && plan_of(v.ring ? kTimed[4] : kTimed[0], backward, m, n, k).split == 1) continue;
          if (v.group == 8 && m <= 2048) continue;  // same plan as the default
          list.push_back({v.name, &v});
        }
        int turn = 0;
        bool probing = false;
        auto run = [&](const Contender& c) {
          const Weight& w = q[turn % q.size()];
          const uint16_t* d = dense[turn++ % dense_copies];
          if (!c.variant)
            blas.run(backward, m, n, k, act, d, y);
          else
            run_variant(*c.variant, backward, w, d, act, y, m, stream, probing ? stats : nullptr);
        };
        auto timed = [&](Contender& c, int launches) {
          CK(cudaEventRecord(e0, stream));
          for (int i = 0; i < launches; ++i) run(c);
          CK(cudaEventRecord(e1, stream));
          CK(cudaEventSynchronize(e1));
          CK(cudaGetLastError());
          float ms_total;
          CK(cudaEventElapsedTime(&ms_total, e0, e1));
          return ms_total * 1000.0f / launches;
        };
        for (auto& c : list) {
          timed(c, 1);
          c.launches = std::min(24, std::max(2, static_cast<int>(1200.0f / timed(c, 1))));
        }
        for (int round = 0; round < 5; ++round)
          for (auto& c : list) c.us.push_back(timed(c, c.launches));
        const double flop = 2.0 * m * n * k;
        Row row = {backward == 1, n, k, m, 0, 0, "-"};
        printf(" %s %d %d %d |", backward ? "bwd" : "fwd", n, k, m);
        for (auto& c : list) {
          std::sort(c.us.begin(), c.us.end());
          const float us = c.us[2];
          double empty = 0, ready = 0, cycles_all = 0, steps = 0, slot = 0, decoder = 0;
          if (c.variant && c.variant->slots > 0) {  // one more launch for the counts
            CK(cudaMemsetAsync(stats, 0, kStatWords * kStatBlocks * 4, stream));
            probing = true;
            run(c);
            probing = false;
            CK(cudaStreamSynchronize(stream));
            const auto v = fetch(stats, kStatWords * kStatBlocks);
            for (int b = 0; b < kStatBlocks; ++b) {
              const uint32_t* s = &v[b * kStatWords];
              empty += s[kStatEmpty], ready += s[kStatReady], cycles_all += s[kStatProducer], steps += s[kStatSteps],
                  slot += s[kStatSlot], decoder += s[kStatDecoder];
            }
          }
          cycles_all = std::max(cycles_all, 1.0), steps = std::max(steps, 1.0), decoder = std::max(decoder, 1.0);
          if (!c.variant) {
            row.dense_us = us;
            printf(" cublas %.1f us %.0f TF |", us, flop / us * 1e-6);
          } else {
            printf(" %s %.1f (%.3f; %.0f, %.0f %.0f %.0f%%)", c.name.c_str(), us, us / std::max(row.dense_us, 1e-3f),
                   cycles_all / steps, 100 * empty / cycles_all, 100 * ready / cycles_all, 100 * slot / decoder);
            if (c.variant->ring && !c.variant->publish_only && (row.us == 0 || us < row.us))
              row.us = us, row.name = c.variant->name;
          }
          if (table)
            fprintf(table, "%s\t%d\t%d\t%d\t%s\t%.2f\t%.2f\t%.2f\t%.1f\t%.0f\t%.3f\t%.3f\t%.3f\n",
                    backward ? "bwd" : "fwd", n, k, m, c.name.c_str(), us, c.us[0], c.us[4], flop / us * 1e-6,
                    cycles_all / steps, empty / cycles_all, ready / cycles_all, slot / decoder);
        }
        printf("\n");
        fflush(stdout);
        rows.push_back(row);
      }
    }
    for (auto& w : q) free_weight(w);
    for (auto p : dense) CK(cudaFree(p));
  }
  if (table) fclose(table);
  printf("  timing took %.1f s; the best ring variant against cuBLAS, and the aim:\n", now() - start);
  for (auto& r : rows) {
    const double aim = r.m >= 4096 ? 1.03 : 1.06, ratio = r.us / std::max(r.dense_us, 1e-3f);
    printf("  %s n %5d k %5d m %4d | %7.1f us %-11s | cublas %7.1f us | %.3f %s\n", r.backward ? "bwd" : "fwd", r.n,
           r.k, r.m, r.us, r.name, r.dense_us, ratio,
           r.m < 1024     ? ""
           : ratio <= aim ? "ok"
                          : "OVER");
  }
  return true;
}

int main(int argc, char** argv) {
  setvbuf(stdout, nullptr, _IOLBF, 0);
  const char *cublas = nullptr, *only = nullptr, *table = nullptr;
  for (int i = 1; i < argc; ++i) {
    if (!strcmp(argv[i], "--only") && i + 1 < argc)
      only = argv[++i];
    else if (!strcmp(argv[i], "--table") && i + 1 < argc)
      table = argv[++i];
    else
      cublas = argv[i];
  }
  const double start = now();
  bool ok = true;
  if (!only || !strcmp(only, "host")) {
    printf("[host]\n");
    ok &= host_checks();
    if (only) return ok ? 0 : 1;
  }
  // Items: units, every checked variant both ways, the graph, timing.
  constexpr int kGraph = 1 + 2 * kCheckedCount, kTiming = kGraph + 1, kItemCount = kTiming + 1;
  std::vector<std::string> names = {"units"};
  for (int i = 0; i < 2 * kCheckedCount; ++i)
    names.push_back(std::string(kChecked[i / 2].name) + (i % 2 ? " bwd" : " fwd"));
  names.push_back("graph");
  names.push_back("timing");
  auto wanted = [&](int i) { return !only || names[i].rfind(only, 0) == 0; };
  volatile int* status =
      static_cast<volatile int*>(mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
  auto usable = [&](const Variant& v,
                    bool backward) {  // no crash among the checks of its kernel; wrong results are still worth a time
    for (int i = 0; i < kCheckedCount; ++i)
      if (kChecked[i].ring == v.ring && kChecked[i].cluster == v.cluster &&
          (kChecked[i].slots == 0) == (v.slots == 0) && status[1 + 2 * i + backward] == 4)
        return false;
    return true;
  };
  for (int child = 0; child < 12; ++child) {
    bool left = false;
    for (int i = 0; i < kItemCount; ++i) left |= wanted(i) && status[i] == 0;
    if (!left) break;
    const double child_start = now();
    const pid_t pid = fork();
    if (pid == 0) {
      init_cuda();
      for (int i = 0; i < kItemCount; ++i) {
        if (!wanted(i) || status[i] != 0) continue;
        status[i] = 1;
        printf("[%s]\n", names[i].c_str());
        const double t = now();
        bool good;
        if (i == 0)
          good = test_units();
        else if (i == kGraph)
          good = test_graph();
        else if (i == kTiming)
          good = test_timing(cublas, table, usable);
        else
          good = test_product(kChecked[(i - 1) / 2], (i - 1) % 2,
                              status[1 + (i - 1) % 2] == 2 && status[3 + (i - 1) % 2] == 2);
        CK(cudaDeviceSynchronize());
        status[i] = good ? 2 : 3;
        printf("  (%.2f s)\n", now() - t);
      }
      fflush(stdout);
      _exit(0);
    }
    int code = 0;
    while (waitpid(pid, &code, WNOHANG) == 0) {
      if (now() - child_start > 25.0) {
        printf("  child killed after 25 s\n");
        kill(pid, SIGKILL);
        waitpid(pid, &code, 0);
        break;
      }
      usleep(5000);
    }
    bool ran = false;
    for (int i = 0; i < kItemCount; ++i)
      if (status[i] == 1) {
        status[i] = 4, ran = true;
        printf("  [%s] CRASHED\n", names[i].c_str());
      }
    if (!ran && code != 0) {  // it failed before any item: no use in another
      printf("  child failed at start (code %x)\n", code);
      ok = false;
      break;
    }
    if (now() - start > 45) break;
  }
  printf("[summary] %.1f s:", now() - start);
  const char* words[] = {"not run", "running", "pass", "FAIL", "CRASHED"};
  for (int i = 0; i < kItemCount; ++i) {
    printf(" %s %s;", names[i].c_str(), words[status[i]]);
    ok &= !wanted(i) || status[i] == 2;
  }
  printf(" %s\n", ok ? "ALL PASS" : "NOT ALL PASS");
  return ok ? 0 : 1;
}
