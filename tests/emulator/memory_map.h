// Numbers for what has been accessed of memory, so that nothing depends on addresses, which differ
// from run to run.
#pragma once
#include <cstdint>
#include <vector>

namespace gan::emulator {

// A granule is what one access takes at most: 16 bytes, aligned. Those seen have the numbers 0, 1,
// 2, ... in the order of their first access.
class MemoryMap {
 public:
  static constexpr uintptr_t kGranuleBytes = 16;

  static uintptr_t granule_of(const void* address) {
    return reinterpret_cast<uintptr_t>(address) / kGranuleBytes;
  }

  MemoryMap() : slots_(kFirstSlots) {}
  uint32_t find_or_add(uintptr_t granule) {
    const size_t index = index_of(granule);
    if (slots_[index].granule == granule) return slots_[index].number;
    if ((count_ + 1) * 2 > slots_.size()) return grow_and_add(granule);
    slots_[index] = {granule, count_};
    return count_++;
  }

 private:
  static constexpr size_t kFirstSlots = 4096;
  struct Slot {
    uintptr_t granule = 0;  // 0, where none is: nobody accesses address 0
    uint32_t number = 0;
  };

  size_t index_of(uintptr_t granule) const {
    size_t index = granule * 0x9e3779b97f4a7c15u >> 32;
    while (true) {
      index &= slots_.size() - 1;
      if (slots_[index].granule == granule || slots_[index].granule == 0) return index;
      ++index;
    }
  }
  uint32_t grow_and_add(uintptr_t granule) {
    std::vector<Slot> old(slots_.size() * 2);
    old.swap(slots_);
    for (const Slot& slot : old) {
      if (slot.granule != 0) slots_[index_of(slot.granule)] = slot;
    }
    return find_or_add(granule);
  }

  std::vector<Slot> slots_;
  uint32_t count_ = 0;
};

}  // namespace gan::emulator
