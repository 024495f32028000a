// Launching and checking: every kernel goes through launch(), which throws with the shapes when CUDA refuses.
#pragma once

#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <string>

#include "common/error.h"
#include "cuda/device_limits.h"
#include "fastpeft/types.h"

namespace fastpeft::cuda {

inline void check_cuda(cudaError_t status, const std::string& what, const char* file, int line) {
  if (status != cudaSuccess) {
    cudaGetLastError();  // clears an error that is not sticky, so that the next call starts clean
    throw CudaError(
        concat(what, ": ", cudaGetErrorName(status), ": ", cudaGetErrorString(status), " (", file, ":", line, ")"));
  }
}
#define FASTPEFT_CUDA_CHECK(call) ::fastpeft::cuda::check_cuda((call), #call, __FILE__, __LINE__)

struct Grid {
  unsigned blocks;
  unsigned threads;
  unsigned smem_bytes = 0;  // dynamic shared memory of a block
  unsigned cluster = 1;     // blocks of a cluster
  // May start while the kernel before is still running: only for a kernel that waits for it before it touches memory
  // (wait_for_kernel_before), on compute capability 9.0 or later.
  bool overlap_launch = false;
};

inline int device_attribute(cudaDeviceAttr attribute, int device) {
  int value = 0;
  FASTPEFT_CUDA_CHECK(cudaDeviceGetAttribute(&value, attribute, device));
  return value;
}

// Of the current device; asked of the driver once a device.
inline DeviceLimits device_limits() {
  static std::mutex mutex;
  static std::map<int, DeviceLimits> known;
  int device = 0;
  FASTPEFT_CUDA_CHECK(cudaGetDevice(&device));
  const std::lock_guard lock(mutex);
  const auto found = known.find(device);
  if (found != known.end()) return found->second;
#ifdef FASTPEFT_WITH_SM_90A
  constexpr bool kWithSm90a = true;
#else
  constexpr bool kWithSm90a = false;
#endif
  const int architecture = 10 * device_attribute(cudaDevAttrComputeCapabilityMajor, device) +
                           device_attribute(cudaDevAttrComputeCapabilityMinor, device);
  const DeviceLimits limits{architecture, device_attribute(cudaDevAttrMultiProcessorCount, device),
                            device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
                            architecture == 90 && kWithSm90a};
  return known.emplace(device, limits).first->second;
}

// A grid that covers `work` items at `per_block` items a block; kernels step by the grid when it is cut at `limit`.
inline Grid cover(int64_t work, int64_t per_block, unsigned threads, int64_t limit = 1 << 30) {
  const int64_t blocks = (work + per_block - 1) / per_block;
  return {static_cast<unsigned>(blocks < limit ? blocks : limit), threads};
}

// `what` gives the operation and its sizes for the error message: a callable, so that it costs nothing unless needed.
template <typename What, typename... Parameters, typename... Arguments>
void launch(const What& what, void (*kernel)(Parameters...), Grid grid, const Context& context,
            const Arguments&... arguments) {
  if (grid.blocks == 0) return;
  cudaError_t status = cudaSuccess;
  if (grid.smem_bytes > 40 * 1024) {  // with its static memory, more than 48 KB must be asked for; it takes below 1 us
    status =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(grid.smem_bytes));
    if (status != cudaSuccess) check_cuda(status, what(), __FILE__, __LINE__);
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid.blocks, config.blockDim = grid.threads, config.dynamicSmemBytes = grid.smem_bytes;
  config.stream = reinterpret_cast<cudaStream_t>(context.stream);
  cudaLaunchAttribute attributes[2] = {};
  config.attrs = attributes;
  if (grid.cluster > 1) {
    cudaLaunchAttribute& cluster = attributes[config.numAttrs++];
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = grid.cluster, cluster.val.clusterDim.y = 1, cluster.val.clusterDim.z = 1;
  }
  if (grid.overlap_launch) {
    cudaLaunchAttribute& overlap = attributes[config.numAttrs++];
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
  }
  status = cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
  if (status == cudaSuccess) status = cudaGetLastError();
  if (status != cudaSuccess) check_cuda(status, what(), __FILE__, __LINE__);
}

}  // namespace fastpeft::cuda
