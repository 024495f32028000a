// wgmma m64n256k16 on bf16 with both operands in shared memory, and its operands' descriptor.
//
// Source   PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions": wgmma.mma_async, matrix descriptor, shared
//          memory layouts.
#pragma once

#include <stdint.h>

namespace lab {

// Descriptor of an operand under the 128-byte swizzle, tile at a multiple of 1024 bytes. Eight 128-byte rows make a
// group, groups are 1024 bytes apart. K-major (a row is 64 of depth): one k16 step is 32 bytes on. MN-major (a row is
// 64 of out, rows run along the depth): one k16 step is 16 rows on. The other stride has no use here (64 of out, 16 of
// depth), and both fields hold the same.
__device__ __forceinline__ uint64_t make_desc(uint32_t address) {
  return (static_cast<uint64_t>(1) << 62) | (static_cast<uint64_t>(1024 >> 4) << 32) |
         (static_cast<uint64_t>(1024 >> 4) << 16) | ((address & 0x3FFFF) >> 4);
}
template <bool kMnMajor>
constexpr uint32_t kDescStep = kMnMajor ? 2048 >> 4 : 32 >> 4;

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kOpen>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kOpen) : "memory");
}

#define LAB_ACC8(i)                                                                                           \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])

// d = a b^T (+ d). Thread (warp w, lane 4 g + t) holds in d[4 j + i] row 16 w + g + 8 (i >> 1), column 8 j + 2 t + (i &
// 1).
template <bool kMnMajorA>
__device__ __forceinline__ void wgmma(float (&d)[128], uint64_t desc_a, uint64_t desc_b, bool accumulate) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %130, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
      "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
      "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
      "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "
      "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127},  "
      "%128, %129, p, 1, 1, %131, 0;\n}\n"
      : LAB_ACC8(0), LAB_ACC8(8), LAB_ACC8(16), LAB_ACC8(24), LAB_ACC8(32), LAB_ACC8(40), LAB_ACC8(48), LAB_ACC8(56),
        LAB_ACC8(64), LAB_ACC8(72), LAB_ACC8(80), LAB_ACC8(88), LAB_ACC8(96), LAB_ACC8(104), LAB_ACC8(112),
        LAB_ACC8(120)
      : "l"(desc_a), "l"(desc_b), "r"(static_cast<int>(accumulate)), "n"(kMnMajorA ? 1 : 0));
}
#undef LAB_ACC8

}  // namespace lab
