// Which rows of a list are in which slot at once, and what travels: pure host code.
//
// Plan     Rows fill one slot after another and are cut where a slot ends, at whole chunks. State that lies in one
//          range of addresses travels in one copy, small gaps (padding) included; all of it stays on the 16-byte grid
//          as it lay on the host.
#pragma once

#include <algorithm>

#include "common/adamw_table.h"
#include "common/error.h"
#include "common/integer.h"
#include "fastpeft/adamw.h"

namespace fastpeft::cuda {

namespace far {

class Plan {
 public:
  Plan(AdamWList& list, std::byte* memory, int64_t slot_bytes, int slots)
      : list_(list), memory_(memory), slot_bytes_(slot_bytes), slots_(slots) {
    check(slot_bytes >= kMargin + bytes_of(kAdamWChunk), "adamw: slots of ", slot_bytes, " bytes hold no chunk");
  }

  void take(const AdamWRow& given, int64_t source) {
    for (int64_t done = 0; done < given.numel;) {
      const int64_t left = given.numel - done, room = this->room();
      const int64_t count = left <= room ? left : room / kAdamWChunk * kAdamWChunk;
      if (open_ && count < std::min(left, kLeast)) {
        open_ = false, used_ = 0;
        continue;
      }
      add(given, done, count, source);
      done += count;
    }
  }

 private:
  static constexpr int64_t kLeast = 16 * kAdamWChunk;  // elements that are worth a cut
  static constexpr int64_t kGap = 256;                 // bytes that are copied rather than parted at
  static constexpr int64_t kMargin = 4 * 512;          // bytes that the four ranges of a row can lose to alignment

  int64_t bytes_of(int64_t elements) const {
    if (!list_.eight_bit) return elements * 2 * static_cast<int64_t>(sizeof(float));
    return elements * 2 + ceil_div(elements, kAdamWBlock) * 2 * static_cast<int64_t>(sizeof(float));
  }

  // Elements of a row that the open slot still takes.
  int64_t room() const {
    const int64_t bytes = slot_bytes_ - used_ - kMargin;
    if (bytes <= 0) return 0;
    if (!list_.eight_bit) return bytes / 8;
    return bytes / bytes_of(kAdamWBlock) * kAdamWBlock;
  }

  void add(const AdamWRow& given, int64_t done, int64_t count, int64_t source) {
    if (!open_) {
      list_.batches.push_back({std::ssize(list_.rows), 0, {}});
      open_ = true;
    }
    AdamWRow row = given;
    const int64_t bytes_each = list_.eight_bit ? 1 : 4, item = adamw_item_bytes(list_.param_dtype);
    row.param = static_cast<std::byte*>(given.param) + done * item;
    row.offset += done, row.numel = count;
    row.exp_avg = travel(static_cast<std::byte*>(given.exp_avg) + done * bytes_each, count * bytes_each);
    row.exp_avg_sq = travel(static_cast<std::byte*>(given.exp_avg_sq) + done * bytes_each, count * bytes_each);
    if (list_.eight_bit) {
      const int64_t scales = ceil_div(count, kAdamWBlock) * static_cast<int64_t>(sizeof(float));
      row.absmax = reinterpret_cast<float*>(travel(bytes_at(given.absmax + done / kAdamWBlock), scales));
      row.absmax_sq = reinterpret_cast<float*>(travel(bytes_at(given.absmax_sq + done / kAdamWBlock), scales));
    }
    list_.rows.push_back(row);
    list_.sources.push_back(source);
    ++list_.batches.back().rows;
  }

  static std::byte* bytes_at(float* scales) { return reinterpret_cast<std::byte*>(scales); }

  // Where bytes of the host are in the open slot.
  std::byte* travel(std::byte* host, int64_t bytes) {
    std::vector<AdamWCopy>& copies = list_.batches.back().copies;
    if (!copies.empty()) {
      AdamWCopy& last = copies.back();
      const int64_t gap = host - (last.host + last.bytes);
      if (gap >= 0 && gap < kGap) {
        last.bytes += gap + bytes;
        used_ = last.slot + last.bytes - slot();
        return last.slot + (host - last.host);
      }
    }
    const auto grid = static_cast<int64_t>(reinterpret_cast<uintptr_t>(host) % 16);
    std::byte* to = slot() + ceil_div(used_, 256) * 256 + grid;
    copies.push_back({host, to, bytes});
    used_ = to + bytes - slot();
    return to;
  }

  std::byte* slot() const { return memory_ + (std::ssize(list_.batches) - 1) % slots_ * slot_bytes_; }

  AdamWList& list_;
  std::byte* memory_;
  int64_t slot_bytes_;
  int slots_;
  int64_t used_ = 0;  // bytes of the open slot
  bool open_ = false;
};

}  // namespace far

// Parts a list's rows into batches, which take slots of `slot_bytes` from `memory` on in turns.
inline void adamw_plan_far(AdamWList& list, std::byte* memory, int64_t slot_bytes, int slots) {
  const std::vector<AdamWRow> given = std::move(list.rows);
  list.rows.clear();
  far::Plan plan(list, memory, slot_bytes, slots);
  for (size_t i = 0; i < given.size(); ++i) plan.take(given[i], static_cast<int64_t>(i));
}

}  // namespace fastpeft::cuda
