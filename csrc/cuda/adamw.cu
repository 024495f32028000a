// AdamW on CUDA: three small things before it and one launch for a whole list of tensors.
//
// Plan     The list lies in a table on the device. Kernels write to it what they carry in their parameters (up to 32
//          KB since CUDA 12.1), so nothing is copied from host memory that would have to stay, and a captured graph
//          needs no buffer. Rows are written once; addresses of gradients when they have changed.
// Limits   A list that was once captured is written anew at each step: a replay may have put the graph's addresses.
#include "fastpeft/adamw.h"

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "cuda/adamw_kernel.cuh"
#include "cuda/adamw_launch.h"
#include "cuda/device/launch.cuh"

namespace fastpeft::cuda {
namespace {

constexpr int kSmallPayload = 3840, kLargePayload = 32000;

template <int kBytes>
void write_part(const std::byte* from, int64_t bytes, std::byte* to, const Context& context) {
  AdamWPayload<kBytes> payload{};
  std::memcpy(payload.words, from, bytes);
  launch([&] { return concat("adamw: ", bytes, " bytes of the table"); }, adamw_write_kernel<kBytes>, Grid{1, 256},
         context, payload, reinterpret_cast<uint4*>(to), static_cast<int>(ceil_div(bytes, 16)));
}

void write(const void* from, int64_t bytes, std::byte* to, const Context& context) {
  const std::byte* here = static_cast<const std::byte*>(from);
  for (int64_t done = 0; done < bytes;) {
    const int64_t part = std::min<int64_t>(bytes - done, kLargePayload);
    (part <= kSmallPayload ? write_part<kSmallPayload> : write_part<kLargePayload>)(here + done, part, to + done,
                                                                                    context);
    done += part;
  }
}

bool is_capturing(const Context& context) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  FASTPEFT_CUDA_CHECK(cudaStreamIsCapturing(reinterpret_cast<cudaStream_t>(context.stream), &status));
  return status != cudaStreamCaptureStatusNone;
}

void write_table(AdamWList& list, const std::vector<const void*>& grads, const Context& context) {
  const AdamWTable at(list);
  std::byte* table = static_cast<std::byte*>(list.table);
  const bool capturing = is_capturing(context);
  list.captured = list.captured || capturing;
  if (!list.table_written) {
    write(list.rows.data(), std::ssize(list.rows) * sizeof(AdamWRow), table + at.rows, context);
    write(list.tensors.data(), std::ssize(list.tensors) * sizeof(AdamWTensor), table + at.tensors, context);
    const std::vector<uint32_t> first_chunks = adamw_first_chunks(list);
    write(first_chunks.data(), std::ssize(first_chunks) * sizeof(uint32_t), table + at.first_chunks, context);
    list.table_written = !capturing;
  }
  if (list.captured || grads != list.table_grads) {
    list.table_grads.clear();  // unknown until it is written
    write(grads.data(), std::ssize(grads) * sizeof(void*), table + at.grads, context);
    if (!list.captured) list.table_grads = grads;
  }
}

template <typename P, typename G, bool kStochastic>
void launch_update(const AdamWList& list, const AdamWLaunch& rows, const Context& context) {
  const auto what = [&] { return concat("adamw over ", rows.row_count, " tensors"); };
  if (list.eight_bit) {
    const unsigned blocks = std::min<unsigned>(rows.chunks, 2 * device_limits().sms);
    launch(what, adamw_8bit_kernel<P, G, kStochastic>, Grid{blocks, kAdamWThreads}, context, rows);
  } else {
    launch(what, adamw_kernel<P, G, kStochastic>, Grid{rows.chunks, kAdamWThreads}, context, rows);
  }
}

}  // namespace

void adamw_prepare(const AdamWStepArgs& args, const Context& context) {
  AdamWList& list = *args.list;
  write_table(list, args.grads, context);
  const AdamWTable at(list);
  std::byte* table = static_cast<std::byte*>(list.table);
  const auto tensors = static_cast<int>(list.tensors.size());
  launch([&] { return concat("adamw: factors of ", tensors, " tensors"); }, adamw_prepare_kernel,
         cover(tensors, 64, 64), context, adamw_schedule(args), args.control,
         reinterpret_cast<const AdamWTensor*>(table + at.tensors), reinterpret_cast<AdamWFactors*>(table + at.factors),
         tensors);
}

void adamw_update_rows(const AdamWStepArgs& args, int64_t first_row, int64_t rows, const Context& context) {
  const AdamWList& list = *args.list;
  const AdamWTable at(list);
  const std::byte* table = static_cast<const std::byte*>(list.table);
  int64_t chunks = 0;
  for (int64_t i = first_row; i < first_row + rows; ++i) chunks += ceil_div(list.rows[i].numel, kAdamWChunk);
  check(chunks <= INT32_MAX, "adamw: a list of more than 2^43 elements");
  const AdamWLaunch launched{reinterpret_cast<const AdamWRow*>(table + at.rows) + first_row,
                             reinterpret_cast<const uint32_t*>(table + at.first_chunks) + first_row,
                             reinterpret_cast<const void* const*>(table + at.grads) + first_row,
                             reinterpret_cast<const AdamWFactors*>(table + at.factors),
                             args.control,
                             adamw_rates(args),
                             static_cast<int>(rows),
                             static_cast<uint32_t>(chunks)};
  dispatch("adamw", list.param_dtype, [&](auto param_zero) {
    dispatch("adamw", args.grad_dtype, [&](auto grad_zero) {
      using P = decltype(param_zero);
      using G = decltype(grad_zero);
      if constexpr (std::is_same_v<P, BFloat16>) {
        if (args.stochastic) return launch_update<P, G, true>(list, launched, context);
      }
      launch_update<P, G, false>(list, launched, context);
    });
  });
}

void adamw_step(const AdamWStepArgs& args, const Context& context) {
  check_adamw(args);
  if (args.list->arena != nullptr) return adamw_far_step(args, context);
  adamw_prepare(args, context);
  adamw_update_rows(args, 0, std::ssize(args.list->rows), context);
}

}  // namespace fastpeft::cuda
