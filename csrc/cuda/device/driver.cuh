// Functions of the driver, asked of it at run time, so that the module links to no libcuda and loads where there is
// none.
#pragma once

#include <cuda.h>

#include "cuda/device/launch.cuh"

namespace fastpeft::cuda {

template <typename Function>
Function driver_function(const char* name) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult result;
  FASTPEFT_CUDA_CHECK(cudaGetDriverEntryPointByVersion(name, &function, 12000, cudaEnableDefault, &result));
  check(result == cudaDriverEntryPointSuccess, "the driver has no ", name, "; update it");
  return reinterpret_cast<Function>(function);
}

// FASTPEFT_DRIVER(cuMemMap)(...) calls cuMemMap.
#define FASTPEFT_DRIVER(name)                                                                         \
  ([] {                                                                                               \
    static const auto found = ::fastpeft::cuda::driver_function<decltype(&::name)>(#name); /* once */ \
    return found;                                                                                     \
  }())

}  // namespace fastpeft::cuda
