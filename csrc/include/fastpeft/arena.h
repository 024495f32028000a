// Memory for optimizer state of which each page lies on the device or on the host, as told. CUDA alone.
//
// Managed  One unified allocation. Pages of the device have it as their preferred location; those of the host have the
//          host, and are mapped for the device. Moving is prefetching.
// Pinned   One range of addresses of the device, with memory behind the pages that lie there, beside pinned host memory
//          for all of them. Copies of it go at the link's speed, where those of managed memory reach a tenth
//          (bench/LOG.md, 2026-11-26): what to use, unless host memory for pages of the device is too dear.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

#include "fastpeft/types.h"

namespace fastpeft::cuda {

constexpr int64_t kArenaPage = int64_t{2} << 20;  // bytes
constexpr int kArenaSlots = 3;

enum class ArenaMode { kManaged, kPinned };

struct ArenaView {
  std::byte* address;
  bool device;  // an address of the device, as all of a managed arena are
};

class Arena {
 public:
  // On the current device; whole pages, all on the host and zero. `slot_bytes` is the size of each slot.
  Arena(int64_t bytes, ArenaMode mode, int64_t slot_bytes);
  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  // Whether the current device can have a managed one.
  static bool has_managed();

  int64_t bytes() const;
  ArenaMode mode() const;
  ArenaView view(int64_t offset, int64_t bytes) const;
  const std::vector<bool>& on_device() const;  // for each page

  // Behind the work of the caller's stream. Pinned pages that leave the device wait for it on the host.
  void move(int64_t first_page, int64_t pages, bool to_device, const Context& context);

  // Device memory, streams and events through which state on the host is stepped (cuda/arena_slots.cuh); made by the
  // first call.
  struct Slots;
  Slots& slots();

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace fastpeft::cuda
