// PTX instructions the kernels need by name, each wrapped once.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace fastpeft::cuda {

// PTX ISA 9.7.3 (rcp, mul, max): the approximate reciprocal and flush-to-zero arithmetic that bitsandbytes is compiled
// to. Codes and scales are bit-exact with it only through these; the IEEE forms differ in the last bit.
__device__ inline float rcp_approx_ftz(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// PTX ISA 9.7.3 (ex2): 2^x within 2 units in the last place.
__device__ inline float exp2_approx_ftz(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ inline float mul_ftz(float a, float b) {
  float y;
  asm("mul.rn.ftz.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}

__device__ inline float add_ftz(float a, float b) {
  float y;
  asm("add.rn.ftz.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}

__device__ inline float max_ftz(float a, float b) {
  float y;
  asm("max.ftz.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}

__device__ inline bool greater_ftz(float a, float b) {
  int y;
  asm("{ .reg .pred p; setp.gt.ftz.f32 p, %1, %2; selp.s32 %0, 1, 0, p; }" : "=r"(y) : "f"(a), "f"(b));
  return y != 0;
}

// d += e * scale if a bit is set: one predicated instruction, for which the compiler takes two.
__device__ inline void add_if(uint32_t bits, float& d, float e, float scale) {
  asm("{\n.reg .pred p;\nsetp.ne.u32 p, %1, 0;\n@p fma.rn.f32 %0, %2, %3, %0;\n}\n"
      : "+f"(d)
      : "r"(bits), "f"(e), "f"(scale));
}

// Address within shared memory, in the 32 bits that instructions take.
__device__ inline uint32_t smem_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// PTX ISA 9.7.9.8 (ld): a load that stays where it stands among copies and barriers. One through the path for constant
// data, as __ldg makes it, the assembler puts off until the value is needed, behind a barrier too.
__device__ inline uint4 load_16(const void* from) {
  uint4 v;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from)
               : "memory");
  return v;
}

__device__ inline float load_4(const float* from) {
  float v;
  asm volatile("ld.global.f32 %0, [%1];" : "=f"(v) : "l"(from) : "memory");
  return v;
}

// The same where `wanted` holds, else zeros. The predicate stands in the instruction, so that no branch parts a row of
// loads.
__device__ inline uint4 load_16_if(bool wanted, const void* from) {
  uint4 v{0, 0, 0, 0};
  asm volatile("{ .reg .pred p; setp.ne.u32 p, %5, 0; @p ld.global.v4.u32 {%0, %1, %2, %3}, [%4]; }"
               : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)
               : "l"(from), "r"(static_cast<unsigned>(wanted))
               : "memory");
  return v;
}

// The same for data that is read once: it pushes nothing out of L1.
__device__ inline uint4 load_16_once_if(bool wanted, const void* from) {
  uint4 v{0, 0, 0, 0};
  asm volatile("{ .reg .pred p; setp.ne.u32 p, %5, 0; @p ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4]; }"
               : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)
               : "l"(from), "r"(static_cast<unsigned>(wanted))
               : "memory");
  return v;
}

// PTX ISA 9.7.9.11 (st): one store of 16 bytes where `wanted` holds.
__device__ inline void store_16_if(bool wanted, void* to, uint4 v) {
  asm volatile("{ .reg .pred p; setp.ne.u32 p, %5, 0; @p st.global.v4.u32 [%4], {%0, %1, %2, %3}; }" ::"r"(v.x),
               "r"(v.y), "r"(v.z), "r"(v.w), "l"(to), "r"(static_cast<unsigned>(wanted))
               : "memory");
}

// PTX ISA 9.7.9.15 (prefetch): the line of 128 bytes into L1.
__device__ inline void prefetch_l1(const void* from) { asm volatile("prefetch.global.L1 [%0];" ::"l"(from)); }

// PTX ISA 9.7.9.25 (cp.async.bulk.prefetch), from compute capability 9.0: `bytes`, whole packs of 16, into L2. Allowed
// before wait_for_kernel_before: L2 takes the writes of all SMs, so what it holds cannot be stale.
__device__ inline void prefetch_l2([[maybe_unused]] const void* from, [[maybe_unused]] uint32_t bytes) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
#endif
}

// PTX ISA 9.7.9.25.3 (cp.async): 16 bytes from global to shared memory behind the thread's back, past L1; a miss
// fetches the whole 128-byte line into L2. The thread sees them after wait_async, others after a barrier too.
__device__ inline void copy_async_16(uint32_t to_shared, const void* from) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(to_shared), "l"(from) : "memory");
}

// The same for the first `bytes` of 16, zeros for the rest.
__device__ inline void copy_async_16(uint32_t to_shared, const void* from, uint32_t bytes) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to_shared), "l"(from), "r"(bytes)
               : "memory");
}

// Four bytes, which go through L1.
__device__ inline void copy_async_4(uint32_t to_shared, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to_shared), "l"(from) : "memory");
}

__device__ inline void commit_async() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most kPending of the groups committed by this thread are still under way.
template <int kPending>
__device__ inline void wait_async() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// PTX ISA 9.7.9.7 (prmt): byte i of the result is the byte of {b, a} that the low three bits of nibble i of `selectors`
// name, or, where the nibble's top bit is set, eight copies of that byte's sign.
__device__ inline uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selectors) {
  uint32_t v;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(v) : "r"(a), "r"(b), "r"(selectors));
  return v;
}

// PTX ISA 9.7.6 (set, half precision; abs): all bits of a half of `a` whose lower 15 are at least those of the same
// half of `b`, which is at most 0x7C00; else none. They are compared as float16: positive ones are in the order of
// their bits, and what is behind infinity compares as unordered, hence `geu`.
__device__ inline uint32_t at_least(uint32_t a, uint32_t b) {
  uint32_t v;
  asm("{ .reg .b32 magnitude; abs.f16x2 magnitude, %1; set.geu.u32.f16x2 %0, magnitude, %2; }"
      : "=r"(v)
      : "r"(a), "r"(b));
  return v;
}

// PTX ISA 9.7.14.5.15 (ldmatrix): four 8 x 8 matrices of 16-bit values; lane i gives the shared address of row i % 8 of
// matrix i / 8. Lane (g, t) = (lane / 4, lane % 4) gets of each matrix row g at columns 2t and 2t + 1, or, transposed,
// rows 2t and 2t + 1 at column g. No memory clobber, so that stores to other tiles may pass: only a barrier orders it.
template <bool kTransposed>
__device__ inline void load_matrices(uint32_t (&to)[4], uint32_t shared_address) {
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address));
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address));
  }
}

// PTX ISA 9.7.13.13 (griddepcontrol), from compute capability 9.0. A kernel launched with Grid::overlap_launch starts
// when every block of the one before has let it or has ended, and must not touch memory before it has waited: only then
// have the kernels before ended and can their writes be seen. Except for weights, codes and scales: what writes them
// never lets the next kernel start, so they are whole whenever a kernel behind it starts, however many are between.
// Without that attribute neither does anything.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
inline constexpr bool kLaunchesOverlap = true;
__device__ inline void wait_for_kernel_before() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
__device__ inline void let_next_kernel_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
#else
inline constexpr bool kLaunchesOverlap = false;
__device__ inline void wait_for_kernel_before() {}
__device__ inline void let_next_kernel_start() {}
#endif

// PTX ISA 9.7.14.5.8 (mma.m16n8k16): d += a b, float32 sums. Lane (g, t) = (lane / 4, lane % 4) holds of a rows g and
// g + 8 at k 2t (+1) and 2t + 8 (+1), of b column g at the same k, of d rows g and g + 8 at columns 2t and 2t + 1.
template <typename T>
__device__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
__device__ inline void mma_m16n8k16<__nv_bfloat16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ inline void mma_m16n8k16<__half>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace fastpeft::cuda
