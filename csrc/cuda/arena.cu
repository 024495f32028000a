// The arena (fastpeft/arena.h): unified memory with advice for each page, or pages of device memory beside pinned ones.
//
// Source   CUDA programming guide, "Unified memory" (performance hints) and "Virtual memory management".
#include "fastpeft/arena.h"

#include <cuda.h>

#include <algorithm>
#include <cstring>

#include "common/integer.h"
#include "cuda/arena_slots.cuh"
#include "cuda/device/driver.cuh"
#include "cuda/device/launch.cuh"

namespace fastpeft::cuda {
namespace {

int current_device() {
  int device = 0;
  FASTPEFT_CUDA_CHECK(cudaGetDevice(&device));
  return device;
}

// --- managed pages ---------------------------------------------------------------------------------------------------

#if CUDART_VERSION >= 13000
cudaMemLocation location(bool on_device, int device) {
  cudaMemLocation found{};
  found.type = on_device ? cudaMemLocationTypeDevice : cudaMemLocationTypeHost;
  found.id = on_device ? device : 0;
  return found;
}
void prefetch(std::byte* from, int64_t bytes, bool to_device, int device, cudaStream_t stream) {
  FASTPEFT_CUDA_CHECK(cudaMemPrefetchAsync(from, bytes, location(to_device, device), 0, stream));
}
#else
int location(bool on_device, int device) { return on_device ? device : cudaCpuDeviceId; }
void prefetch(std::byte* from, int64_t bytes, bool to_device, int device, cudaStream_t stream) {
  FASTPEFT_CUDA_CHECK(cudaMemPrefetchAsync(from, bytes, location(to_device, device), stream));
}
#endif

void prefer(std::byte* from, int64_t bytes, bool on_device, int device) {
  FASTPEFT_CUDA_CHECK(cudaMemAdvise(from, bytes, cudaMemAdviseSetPreferredLocation, location(on_device, device)));
}

// --- pages of device memory behind a range of addresses --------------------------------------------------------------

void check_driver(CUresult status, const char* what) {
  if (status == CUDA_SUCCESS) return;
  const char* name = nullptr;
  FASTPEFT_DRIVER(cuGetErrorName)(status, &name);
  throw CudaError(concat("arena: ", what, ": ", name == nullptr ? "unknown error" : name));
}

class DevicePages {
 public:
  DevicePages(int64_t pages, int device) : handles_(pages) {
    properties_.type = CU_MEM_ALLOCATION_TYPE_PINNED;
    properties_.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
    properties_.location.id = device;
    size_t granularity = 0;
    check_driver(
        FASTPEFT_DRIVER(cuMemGetAllocationGranularity)(&granularity, &properties_, CU_MEM_ALLOC_GRANULARITY_MINIMUM),
        "cuMemGetAllocationGranularity");
    check(kArenaPage % granularity == 0, "arena: the device's pages are ", granularity, " bytes; at most ", kArenaPage,
          " are supported");
    check_driver(FASTPEFT_DRIVER(cuMemAddressReserve)(&base_, pages * kArenaPage, 0, 0, 0), "cuMemAddressReserve");
  }
  ~DevicePages() {
    unmap(0, std::ssize(handles_));
    free_(base_, handles_.size() * kArenaPage);
  }
  DevicePages(const DevicePages&) = delete;
  DevicePages& operator=(const DevicePages&) = delete;

  std::byte* page(int64_t index) const { return reinterpret_cast<std::byte*>(base_) + index * kArenaPage; }

  // Puts memory behind pages, all of them or none.
  void map(int64_t first, int64_t count) {
    try {
      for (int64_t i = first; i < first + count; ++i) {
        CUmemGenericAllocationHandle handle = 0;
        check_driver(FASTPEFT_DRIVER(cuMemCreate)(&handle, kArenaPage, &properties_, 0),
                     "cuMemCreate of a page of 2 MB on the device");
        const CUresult mapped = FASTPEFT_DRIVER(cuMemMap)(base_ + i * kArenaPage, kArenaPage, 0, handle, 0);
        if (mapped != CUDA_SUCCESS) release_(handle);
        check_driver(mapped, "cuMemMap");
        handles_[i] = handle;
      }
      const CUmemAccessDesc access{properties_.location, CU_MEM_ACCESS_FLAGS_PROT_READWRITE};
      check_driver(FASTPEFT_DRIVER(cuMemSetAccess)(base_ + first * kArenaPage, count * kArenaPage, &access, 1),
                   "cuMemSetAccess");
    } catch (...) {
      unmap(first, count);
      throw;
    }
  }

  // Gives the memory behind pages back; nothing may use them any more.
  void unmap(int64_t first, int64_t count) {
    for (int64_t i = first; i < first + count; ++i) {
      if (handles_[i] == 0) continue;
      unmap_(base_ + i * kArenaPage, kArenaPage);
      release_(handles_[i]);
      handles_[i] = 0;
    }
  }

 private:
  // Asked for at once: a destructor may run when the driver answers no more.
  decltype(&cuMemUnmap) unmap_ = FASTPEFT_DRIVER(cuMemUnmap);
  decltype(&cuMemRelease) release_ = FASTPEFT_DRIVER(cuMemRelease);
  decltype(&cuMemAddressFree) free_ = FASTPEFT_DRIVER(cuMemAddressFree);
  CUmemAllocationProp properties_{};
  CUdeviceptr base_ = 0;
  std::vector<CUmemGenericAllocationHandle> handles_;  // 0: none
};

}  // namespace

// --- the arena -------------------------------------------------------------------------------------------------------

struct Arena::State {
  ArenaMode mode;
  int device;
  int64_t slot_bytes;
  std::vector<bool> on_device;
  std::byte* host = nullptr;  // managed: all there is
  std::unique_ptr<DevicePages> pages = nullptr;
  std::unique_ptr<Slots> slots = nullptr;

  int64_t bytes() const { return std::ssize(on_device) * kArenaPage; }

  void allocate() {
    if (mode == ArenaMode::kManaged) {
      FASTPEFT_CUDA_CHECK(cudaMallocManaged(reinterpret_cast<void**>(&host), bytes(), cudaMemAttachGlobal));
      prefer(host, bytes(), false, device);
      FASTPEFT_CUDA_CHECK(cudaMemAdvise(host, bytes(), cudaMemAdviseSetAccessedBy, location(true, device)));
      prefetch(host, bytes(), false, device, nullptr);
      FASTPEFT_CUDA_CHECK(cudaMemsetAsync(host, 0, bytes(), nullptr));
      FASTPEFT_CUDA_CHECK(cudaStreamSynchronize(nullptr));
    } else {
      FASTPEFT_CUDA_CHECK(cudaHostAlloc(reinterpret_cast<void**>(&host), bytes(), cudaHostAllocDefault));
      std::memset(host, 0, bytes());
      pages = std::make_unique<DevicePages>(std::ssize(on_device), device);
    }
  }

  // Work under way on the memory ends first; errors have nowhere to go.
  ~State() {
    int before = 0;
    cudaGetDevice(&before);
    cudaSetDevice(device);
    cudaDeviceSynchronize();
    slots.reset();
    pages.reset();
    if (host != nullptr) mode == ArenaMode::kManaged ? cudaFree(host) : cudaFreeHost(host);
    cudaSetDevice(before);
  }

  void move_run(int64_t first, int64_t count, bool to_device, cudaStream_t stream) {
    std::byte* from = host + first * kArenaPage;
    const int64_t run_bytes = count * kArenaPage;
    if (mode == ArenaMode::kManaged) {
      prefer(from, run_bytes, to_device, device);
      prefetch(from, run_bytes, to_device, device, stream);
    } else if (to_device) {
      pages->map(first, count);
      FASTPEFT_CUDA_CHECK(cudaMemcpyAsync(pages->page(first), from, run_bytes, cudaMemcpyHostToDevice, stream));
    } else {
      FASTPEFT_CUDA_CHECK(cudaMemcpyAsync(from, pages->page(first), run_bytes, cudaMemcpyDeviceToHost, stream));
      FASTPEFT_CUDA_CHECK(cudaStreamSynchronize(stream));
      pages->unmap(first, count);
    }
    std::fill_n(on_device.begin() + first, count, to_device);
  }
};

Arena::Arena(int64_t bytes, ArenaMode mode, int64_t slot_bytes) {
  check(bytes > 0, "Arena: nbytes is ", bytes, "; it must be positive");
  check(slot_bytes >= kArenaPage && slot_bytes % 256 == 0, "Arena: slot_bytes is ", slot_bytes,
        "; it must be at least ", kArenaPage, " and a multiple of 256");
  state_ = std::unique_ptr<State>(
      new State{mode, current_device(), slot_bytes, std::vector<bool>(ceil_div(bytes, kArenaPage))});
  state_->allocate();
}
Arena::~Arena() = default;

ArenaMode Arena::default_mode() {
  return device_attribute(cudaDevAttrConcurrentManagedAccess, current_device()) != 0 ? ArenaMode::kManaged
                                                                                     : ArenaMode::kPinned;
}

int64_t Arena::bytes() const { return state_->bytes(); }
ArenaMode Arena::mode() const { return state_->mode; }
const std::vector<bool>& Arena::on_device() const { return state_->on_device; }

ArenaView Arena::view(int64_t offset, int64_t bytes) const {
  const State& s = *state_;
  check(offset >= 0 && bytes >= 0 && offset + bytes <= s.bytes(), "Arena: bytes from ", offset, " to ", offset + bytes,
        " are outside its ", s.bytes());
  if (s.mode == ArenaMode::kManaged || bytes == 0) return {s.host + offset, s.mode == ArenaMode::kManaged};
  const int64_t first = offset / kArenaPage, behind = ceil_div(offset + bytes, kArenaPage);
  const bool device = s.on_device[first];
  for (int64_t page = first; page < behind; ++page) {
    check(s.on_device[page] == device, "Arena: bytes from ", offset, " to ", offset + bytes,
          " lie in both places; pinned pages of one place only can be seen at once");
  }
  return {device ? s.pages->page(0) + offset : s.host + offset, device};
}

void Arena::move(int64_t first_page, int64_t pages, bool to_device, const Context& context) {
  State& s = *state_;
  const int64_t all = std::ssize(s.on_device);
  check(first_page >= 0 && pages >= 0 && first_page + pages <= all, "Arena: pages from ", first_page, " to ",
        first_page + pages, " are outside its ", all);
  for (int64_t page = first_page; page < first_page + pages;) {
    int64_t behind = page;
    while (behind < first_page + pages && s.on_device[behind] != to_device) ++behind;
    if (behind > page) s.move_run(page, behind - page, to_device, reinterpret_cast<cudaStream_t>(context.stream));
    page = std::max(behind, page + 1);
  }
}

// --- slots -----------------------------------------------------------------------------------------------------------

Arena::Slots::Slots(int64_t bytes) : slot_bytes(bytes) {
  FASTPEFT_CUDA_CHECK(cudaMalloc(reinterpret_cast<void**>(&memory), kArenaSlots * slot_bytes));
  for (cudaStream_t* stream : {&in, &update, &out}) {
    FASTPEFT_CUDA_CHECK(cudaStreamCreateWithFlags(stream, cudaStreamNonBlocking));
  }
  FASTPEFT_CUDA_CHECK(cudaEventCreateWithFlags(&start, cudaEventDisableTiming));
  for (auto* events : {&came, &updated, &left}) {
    for (cudaEvent_t& event : *events) FASTPEFT_CUDA_CHECK(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
  }
}

Arena::Slots::~Slots() {
  for (const cudaStream_t stream : {in, update, out}) {
    if (stream != nullptr) cudaStreamDestroy(stream);
  }
  if (start != nullptr) cudaEventDestroy(start);
  for (const auto* events : {&came, &updated, &left}) {
    for (const cudaEvent_t event : *events) {
      if (event != nullptr) cudaEventDestroy(event);
    }
  }
  cudaFree(memory);
}

Arena::Slots& Arena::slots() {
  if (!state_->slots) state_->slots = std::make_unique<Slots>(state_->slot_bytes);
  return *state_->slots;
}

}  // namespace fastpeft::cuda
