// Launching and checking: every kernel goes through launch(), which throws with the shapes when CUDA refuses.
#pragma once

#include <cuda_runtime.h>

#include <string>

#include "common/error.h"
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
};

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
  kernel<<<grid.blocks, grid.threads, 0, reinterpret_cast<cudaStream_t>(context.stream)>>>(arguments...);
  const cudaError_t status = cudaGetLastError();
  if (status != cudaSuccess) check_cuda(status, what(), __FILE__, __LINE__);
}

}  // namespace fastpeft::cuda
