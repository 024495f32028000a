// PTX instructions of compute capability 9.0a, each wrapped once. Shared memory is addressed by 32-bit offsets.
//
// Source   PTX ISA: 9.7.13.15 (mbarrier), 9.7.9.25 (cp.async.bulk), 9.7.15 (wgmma), 9.7.19.5 (setmaxnreg).
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace fastpeft::cuda {

__device__ inline uint32_t shared_offset(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

__device__ inline void store_shared(uint32_t at, uint4 v) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

__device__ inline uint4 load_shared(uint32_t at) {
  uint4 v;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(at)
               : "memory");
  return v;
}

__device__ inline uint2 load_shared_8(uint32_t at) {
  uint2 v;
  asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(at) : "memory");
  return v;
}

__device__ inline void store_shared_word(uint32_t at, uint32_t v) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(at), "r"(v) : "memory");
}
__device__ inline uint32_t load_shared_word(uint32_t at) {
  uint32_t v;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(v) : "r"(at) : "memory");
  return v;
}

__device__ inline void store_shared_pair(uint32_t at, float first, float second) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(at), "f"(first), "f"(second) : "memory");
}
__device__ inline float2 load_shared_pair(uint32_t at) {
  float2 v;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(at) : "memory");
  return v;
}

// --- mbarrier --------------------------------------------------------------------------------------------------------
__device__ inline void barrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
__device__ inline void barrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ inline void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ inline void barrier_arrive_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// Waits for the end of the phase of this parity; a fresh barrier counts as past the phase of parity 1.
__device__ inline void barrier_wait(uint32_t barrier, uint32_t parity) {
  uint32_t done = 0;
  while (done == 0) {  // try_wait sleeps a while by itself
    asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}\n"
                 : "=r"(done)
                 : "r"(barrier), "r"(parity)
                 : "memory");
  }
}
// Counts who leaves what a thread block shares, back to 0 by the last, for whom the counter was `last`; gives what it
// was.
__device__ inline unsigned leave(uint32_t counter, unsigned last) {
  unsigned before;
  asm volatile("atom.acq_rel.cta.shared::cta.inc.u32 %0, [%1], %2;"
               : "=r"(before)
               : "r"(counter), "r"(last)
               : "memory");
  return before;
}
// A ring's place and the parity of its barriers' phase.
struct Ring {
  int at;
  uint32_t parity;

  template <int kSize>
  __device__ void advance(int by = 1) {
    at += by;
    if (at >= kSize) at -= kSize, parity ^= 1;
  }
};
// The numbered barriers of a thread block, for a part of its threads; 0 is __syncthreads().
__device__ inline void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// --- clusters --------------------------------------------------------------------------------------------------------
__device__ inline uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
__device__ inline uint32_t cluster_size() {
  uint32_t size;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}
__device__ inline void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// The same in two halves: what this thread wrote before it arrived, the others see after they have waited.
__device__ inline void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
__device__ inline void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
// The same place in the shared memory of another thread block of the cluster.
__device__ inline uint32_t shared_of(uint32_t rank, uint32_t at) {
  uint32_t there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(at), "r"(rank));
  return there;
}
// From an address that shared_of gives.
__device__ inline float2 load_cluster_pair(uint32_t there) {
  float2 v;
  asm volatile("ld.shared::cluster.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(there) : "memory");
  return v;
}
__device__ inline float4 load_cluster_four(uint32_t there) {
  float4 v;
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(there)
               : "memory");
  return v;
}
// No .release.cluster: it would cost a MEMBAR, and what it would order here is over when a wgmma is.
__device__ inline void barrier_arrive_remote(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// 16 bytes into another thread block's shared memory; seen there after a barrier of the cluster.
template <typename T>
__device__ inline void store_remote(uint32_t to, const T& value) {
  static_assert(sizeof(T) == 16 && alignof(T) == 16);
  const uint4& v = reinterpret_cast<const uint4&>(value);
  asm volatile("st.shared::cluster.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}
// With these a thread's writes to its shared memory are seen by the threads of the cluster that wait.
__device__ inline void barrier_arrive_cluster(uint32_t barrier) {
  asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ inline void barrier_wait_cluster(uint32_t barrier, uint32_t parity) {
  uint32_t done = 0;
  while (done == 0) {
    asm volatile(
        "{\n.reg .pred p;\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}\n"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  }
}
// From this thread block's shared memory to another's, whose barrier counts the bytes.
__device__ inline void copy_to_remote(uint32_t to, uint32_t from, uint32_t bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "r"(from), "r"(bytes), "r"(barrier)
               : "memory");
}

// --- tensor memory accelerator ---------------------------------------------------------------------------------------
// A run of bytes from global to shared memory, both and the count on the 16-byte grid; the barrier counts the bytes.
__device__ inline void bulk_load(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(from), "r"(bytes), "r"(barrier)
               : "memory");
}
__device__ inline void tma_load(uint32_t to, const CUtensorMap* map, uint32_t barrier, int column, int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::
          "r"(to),
      "l"(map), "r"(barrier), "r"(column), "r"(row)
      : "memory");
}
__device__ inline void tma_store(const CUtensorMap* map, uint32_t from, int column, int row) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map), "r"(from),
               "r"(column), "r"(row)
               : "memory");
}
// Adds to what lies there, in the map's type.
__device__ inline void tma_add(const CUtensorMap* map, uint32_t from, int column, int row) {
  asm volatile("cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.tile.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map),
               "r"(from), "r"(column), "r"(row)
               : "memory");
}
__device__ inline void tma_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
template <int kPending>  // groups whose source may still be read
__device__ inline void tma_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}
__device__ inline void tma_wait() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }
__device__ inline void tma_prefetch(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
// Makes this thread's own stores to shared memory visible to TMA and wgmma.
__device__ inline void fence_async_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// The same of global memory: by who has stored, and by who has learnt of it and lets TMA read.
__device__ inline void fence_async_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

// --- between thread blocks -------------------------------------------------------------------------------------------
// A counter that wraps to 0 after `last`; gives what it was.
__device__ inline unsigned atomic_increment(unsigned* counter, unsigned last) {
  unsigned before;
  asm volatile("atom.relaxed.gpu.global.inc.u32 %0, [%1], %2;" : "=r"(before) : "l"(counter), "r"(last) : "memory");
  return before;
}
// The same, and it publishes and sees what add_release and load_acquire do.
__device__ inline unsigned atomic_increment_synchronising(unsigned* counter, unsigned last) {
  unsigned before;
  asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;" : "=r"(before) : "l"(counter), "r"(last) : "memory");
  return before;
}
// Publishes what this thread, and before a barrier its thread block, has written; load_acquire sees it with the count.
__device__ inline void add_release(unsigned* counter, unsigned value) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(counter), "r"(value) : "memory");
}
// Two neighbouring sums; those of one thread to one place are added in their order.
__device__ inline void add_pair(float* to, float first, float second) {
  asm volatile("red.relaxed.gpu.global.add.v2.f32 [%0], {%1, %2};" ::"l"(to), "f"(first), "f"(second) : "memory");
}
__device__ inline unsigned load_acquire(const unsigned* counter) {
  unsigned value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory");
  return value;
}

// --- registers -------------------------------------------------------------------------------------------------------
template <int kRegisters>
__device__ inline void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ inline void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Four 8x8 matrices of 16-bit elements, transposed on their way: lane i gives the address of row i % 8 of matrix i / 8.
__device__ inline void store_matrices_transposed(uint32_t at, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(r0), "r"(r1),
               "r"(r2), "r"(r3)
               : "memory");
}

// --- wgmma -----------------------------------------------------------------------------------------------------------
// Descriptor of an operand under the 128-byte swizzle, its tile at a multiple of 1024 bytes. Eight rows of 128 bytes
// make a group of 1024. K-major (a row is 64 of the depth): 16 of the depth are 32 bytes. MN-major (a row is 64 of out,
// rows follow the depth): 16 of the depth are 16 rows. Only one of the two strides is used, and both fields hold it.
__device__ inline uint64_t wgmma_descriptor(uint32_t at) {
  return (uint64_t{1} << 62) | (uint64_t{1024 >> 4} << 32) | (uint64_t{1024 >> 4} << 16) | ((at & 0x3ffff) >> 4);
}
// The same of a K-major tile of 16 of the depth, rows of 32 bytes under the 32-byte swizzle.
__device__ inline uint64_t narrow_wgmma_descriptor(uint32_t at) {
  return (uint64_t{3} << 62) | (uint64_t{256 >> 4} << 32) | (uint64_t{1} << 16) | ((at & 0x3ffff) >> 4);
}
// Of an MN-major tile whose rows are 32, 64 or 128 bytes under the swizzle of that width.
template <int kRowBytes>
__device__ inline uint64_t mn_wgmma_descriptor(uint32_t at) {
  constexpr uint64_t kSwizzle = kRowBytes == 128 ? 1 : kRowBytes == 64 ? 2 : 3, kEight = 8 * kRowBytes >> 4;
  return (kSwizzle << 62) | (kEight << 32) | (kEight << 16) | ((at & 0x3ffff) >> 4);
}
template <bool kMnMajor>
constexpr uint32_t kDescriptorStep = kMnMajor ? 2048 >> 4 : 32 >> 4;

__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
__device__ inline void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// d = a b^T, or d += a b^T: 64 rows of out by kTokens, 16 of the depth; a and b MN-major or K-major. Thread (warp
// w, lane 4g + t) of the warpgroup holds in d[4j + i] row 16w + g + 8(i / 2), token 8j + 2t + i % 2.
template <typename T, bool kMnMajor, int kTokens, bool kMnMajorB = false>
__device__ void wgmma(float (&d)[kTokens / 2], uint64_t a, uint64_t b, bool accumulate);

#define FASTPEFT_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define FASTPEFT_D16(i) FASTPEFT_D4(i), FASTPEFT_D4(i + 4), FASTPEFT_D4(i + 8), FASTPEFT_D4(i + 12)
#define FASTPEFT_D64(i) FASTPEFT_D16(i), FASTPEFT_D16(i + 16), FASTPEFT_D16(i + 32), FASTPEFT_D16(i + 48)
#define FASTPEFT_D8(i) FASTPEFT_D4(i), FASTPEFT_D4(i + 4)
#define FASTPEFT_R8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define FASTPEFT_R16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define FASTPEFT_R32 FASTPEFT_R16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define FASTPEFT_R64                                                                                       \
  FASTPEFT_R32                                                                                             \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, " \
  "%52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define FASTPEFT_R128                                                                                       \
  FASTPEFT_R64                                                                                              \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, "       \
  "%83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, " \
  "%103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, "  \
  "%120, %121, %122, %123, %124, %125, %126, %127"
// `A`, `B`, `P`, `MA`, `MB`: the operands' numbers behind the accumulators'.
#define FASTPEFT_WGMMA_OF(TYPE, NAME, N, R, D, A, B, P, MA, MB)                                                       \
  template <bool kMnMajor, bool kMnMajorB>                                                                            \
  __device__ inline void wgmma_##NAME##_##N(float(&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {              \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " P ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE   \
                 "." TYPE " {" R "}, " A ", " B ", p, 1, 1, " MA ", " MB ";\n}\n"                                     \
                 : D                                                                                                  \
                 : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(kMnMajor ? 1 : 0), "n"(kMnMajorB ? 1 : 0)); \
  }                                                                                                                   \
  static_assert(true)
#define FASTPEFT_WGMMA_REGISTERS_OF(TYPE, NAME, N, R, D, A0, A1, A2, A3, B, P)                                      \
  __device__ inline void wgmma_registers_##NAME##_##N(float(&d)[N / 2], const uint32_t* a, uint64_t b,              \
                                                      bool accumulate) {                                            \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " P ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE \
                 "." TYPE " {" R "}, {" A0 ", " A1 ", " A2 ", " A3 "}, " B ", p, 1, 1, 0;\n}\n"                     \
                 : D                                                                                                \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)));          \
  }                                                                                                                 \
  static_assert(true)
#define FASTPEFT_WGMMA_SIZES(TYPE, NAME)                                                                              \
  FASTPEFT_WGMMA_OF(TYPE, NAME, 16, FASTPEFT_R8, FASTPEFT_D8(0), "%8", "%9", "%10", "%11", "%12");                    \
  FASTPEFT_WGMMA_OF(TYPE, NAME, 32, FASTPEFT_R16, FASTPEFT_D16(0), "%16", "%17", "%18", "%19", "%20");                \
  FASTPEFT_WGMMA_OF(TYPE, NAME, 64, FASTPEFT_R32, FASTPEFT_D16(0) COMMA FASTPEFT_D16(16), "%32", "%33", "%34", "%35", \
                    "%36");                                                                                           \
  FASTPEFT_WGMMA_OF(TYPE, NAME, 128, FASTPEFT_R64, FASTPEFT_D64(0), "%64", "%65", "%66", "%67", "%68");               \
  FASTPEFT_WGMMA_OF(TYPE, NAME, 256, FASTPEFT_R128, FASTPEFT_D64(0) COMMA FASTPEFT_D64(64), "%128", "%129", "%130",   \
                    "%131", "%132");                                                                                  \
  FASTPEFT_WGMMA_REGISTERS_OF(TYPE, NAME, 32, FASTPEFT_R16, FASTPEFT_D16(0), "%16", "%17", "%18", "%19", "%20",       \
                              "%21");                                                                                 \
  FASTPEFT_WGMMA_REGISTERS_OF(TYPE, NAME, 64, FASTPEFT_R32, FASTPEFT_D16(0) COMMA FASTPEFT_D16(16), "%32", "%33",     \
                              "%34", "%35", "%36", "%37");                                                            \
  FASTPEFT_WGMMA_REGISTERS_OF(TYPE, NAME, 128, FASTPEFT_R64, FASTPEFT_D64(0), "%64", "%65", "%66", "%67", "%68",      \
                              "%69");                                                                                 \
  FASTPEFT_WGMMA_REGISTERS_OF(TYPE, NAME, 256, FASTPEFT_R128, FASTPEFT_D64(0) COMMA FASTPEFT_D64(64), "%128", "%129", \
                              "%130", "%131", "%132", "%133")
#define COMMA ,
FASTPEFT_WGMMA_SIZES("bf16", bf16);
FASTPEFT_WGMMA_SIZES("f16", f16);
#undef COMMA
#undef FASTPEFT_WGMMA_SIZES
#undef FASTPEFT_WGMMA_OF
#undef FASTPEFT_WGMMA_REGISTERS_OF
#undef FASTPEFT_R128
#undef FASTPEFT_R64
#undef FASTPEFT_R32
#undef FASTPEFT_R16
#undef FASTPEFT_R8
#undef FASTPEFT_D64
#undef FASTPEFT_D16
#undef FASTPEFT_D8
#undef FASTPEFT_D4

template <typename T, bool kMnMajor, int kTokens, bool kMnMajorB>
__device__ inline void wgmma(float (&d)[kTokens / 2], uint64_t a, uint64_t b, bool accumulate) {
  constexpr bool kBf16 = std::is_same_v<T, __nv_bfloat16>;
  if constexpr (kTokens == 16 && kBf16) wgmma_bf16_16<kMnMajor, kMnMajorB>(d, a, b, accumulate);
  if constexpr (kTokens == 32 && kBf16) wgmma_bf16_32<kMnMajor, kMnMajorB>(d, a, b, accumulate);
  if constexpr (kTokens == 64 && kBf16) wgmma_bf16_64<kMnMajor, kMnMajorB>(d, a, b, accumulate);
  if constexpr (kTokens == 128 && kBf16) wgmma_bf16_128<kMnMajor, kMnMajorB>(d, a, b, accumulate);
  if constexpr (kTokens == 256 && kBf16) wgmma_bf16_256<kMnMajor, kMnMajorB>(d, a, b, accumulate);
  if constexpr (kTokens == 16 && !kBf16) wgmma_f16_16<kMnMajor, kMnMajorB>(d, a, b, accumulate);
  if constexpr (kTokens == 32 && !kBf16) wgmma_f16_32<kMnMajor, kMnMajorB>(d, a, b, accumulate);
  if constexpr (kTokens == 64 && !kBf16) wgmma_f16_64<kMnMajor, kMnMajorB>(d, a, b, accumulate);
  if constexpr (kTokens == 128 && !kBf16) wgmma_f16_128<kMnMajor, kMnMajorB>(d, a, b, accumulate);
  if constexpr (kTokens == 256 && !kBf16) wgmma_f16_256<kMnMajor, kMnMajorB>(d, a, b, accumulate);
}

// The same with a in registers: thread (warp w, lane 4g + t) holds rows 16w + g and, in odd registers, 16w + g + 8, at
// depth 2t and 2t + 1, and in the last two registers 8 further. They may not change before the wait.
template <typename T, int kTokens>
__device__ inline void wgmma_registers(float (&d)[kTokens / 2], const uint32_t* a, uint64_t b, bool accumulate) {
  constexpr bool kBf16 = std::is_same_v<T, __nv_bfloat16>;
  if constexpr (kTokens == 32 && kBf16) wgmma_registers_bf16_32(d, a, b, accumulate);
  if constexpr (kTokens == 64 && kBf16) wgmma_registers_bf16_64(d, a, b, accumulate);
  if constexpr (kTokens == 128 && kBf16) wgmma_registers_bf16_128(d, a, b, accumulate);
  if constexpr (kTokens == 256 && kBf16) wgmma_registers_bf16_256(d, a, b, accumulate);
  if constexpr (kTokens == 32 && !kBf16) wgmma_registers_f16_32(d, a, b, accumulate);
  if constexpr (kTokens == 64 && !kBf16) wgmma_registers_f16_64(d, a, b, accumulate);
  if constexpr (kTokens == 128 && !kBf16) wgmma_registers_f16_128(d, a, b, accumulate);
  if constexpr (kTokens == 256 && !kBf16) wgmma_registers_f16_256(d, a, b, accumulate);
}

}  // namespace fastpeft::cuda
