// PTX instructions the kernels need by name, each wrapped once.
#pragma once

namespace fastpeft::cuda {

// PTX ISA 9.7.3 (rcp, mul, max): the approximate reciprocal and flush-to-zero arithmetic that bitsandbytes is compiled
// to. Codes and scales are bit-exact with it only through these; the IEEE forms differ in the last bit.
__device__ inline float rcp_approx_ftz(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
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

}  // namespace fastpeft::cuda
