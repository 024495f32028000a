// Asks CUDA which capture a stream is part of.
#include "fastpeft/capture.h"

#include "cuda/device/launch.cuh"

namespace fastpeft::cuda {

uint64_t capture_id(const Context& context) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long id = 0;
  FASTPEFT_CUDA_CHECK(cudaStreamGetCaptureInfo(reinterpret_cast<cudaStream_t>(context.stream), &status, &id));
  return status == cudaStreamCaptureStatusActive ? id + 1 : 0;
}

}  // namespace fastpeft::cuda
