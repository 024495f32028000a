// A step over state that lies on the host: three slots of device memory, through which it travels.
//
// Plan     Three streams, joined to the caller's by events at both ends: one brings state in, one updates it, one takes
//          it out. While a slot is stepped, the next is filled and the one before is emptied, so that the link is busy
//          in both directions and the kernels cost nothing beside it. The host waits for nothing.
#include "cuda/adamw_far_plan.h"
#include "cuda/adamw_launch.h"
#include "cuda/arena_slots.cuh"

namespace fastpeft::cuda {

void adamw_stage(AdamWList& list, Arena& arena) {
  if (arena.mode() == ArenaMode::kManaged) return;
  Arena::Slots& slots = arena.slots();
  adamw_plan_far(list, slots.memory, slots.slot_bytes, kArenaSlots);
  list.arena = &arena;
}

void adamw_far_step(const AdamWStepArgs& given, const Context& context) {
  AdamWStepArgs args = given;
  const AdamWList& list = *args.list;
  args.grads.clear();
  for (const int64_t source : list.sources) args.grads.push_back(given.grads[source]);
  Arena::Slots& slots = list.arena->slots();
  const auto caller = reinterpret_cast<cudaStream_t>(context.stream);

  adamw_prepare(args, context);
  FASTPEFT_CUDA_CHECK(cudaEventRecord(slots.start, caller));
  for (const cudaStream_t stream : {slots.in, slots.update, slots.out}) {
    FASTPEFT_CUDA_CHECK(cudaStreamWaitEvent(stream, slots.start, 0));
  }
  for (int64_t i = 0; i < std::ssize(list.batches); ++i) {
    const AdamWBatch& batch = list.batches[i];
    const auto slot = static_cast<size_t>(i % kArenaSlots);
    if (i >= kArenaSlots) FASTPEFT_CUDA_CHECK(cudaStreamWaitEvent(slots.in, slots.left[slot], 0));
    for (const AdamWCopy& copy : batch.copies) {
      FASTPEFT_CUDA_CHECK(cudaMemcpyAsync(copy.slot, copy.host, copy.bytes, cudaMemcpyDefault, slots.in));
    }
    FASTPEFT_CUDA_CHECK(cudaEventRecord(slots.came[slot], slots.in));
    FASTPEFT_CUDA_CHECK(cudaStreamWaitEvent(slots.update, slots.came[slot], 0));
    adamw_update_rows(args, batch.first_row, batch.rows, {reinterpret_cast<std::uintptr_t>(slots.update)});
    FASTPEFT_CUDA_CHECK(cudaEventRecord(slots.updated[slot], slots.update));
    FASTPEFT_CUDA_CHECK(cudaStreamWaitEvent(slots.out, slots.updated[slot], 0));
    for (const AdamWCopy& copy : batch.copies) {
      FASTPEFT_CUDA_CHECK(cudaMemcpyAsync(copy.host, copy.slot, copy.bytes, cudaMemcpyDefault, slots.out));
    }
    FASTPEFT_CUDA_CHECK(cudaEventRecord(slots.left[slot], slots.out));
  }
  if (list.batches.empty()) return;
  // What went out last came in and was updated before.
  FASTPEFT_CUDA_CHECK(cudaStreamWaitEvent(caller, slots.left[(list.batches.size() - 1) % kArenaSlots], 0));
}

}  // namespace fastpeft::cuda
