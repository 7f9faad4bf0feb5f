// Memory of a rank, with guard bands around it: a kernel that writes beyond it is found out, and
// one that reads beyond it too where AddressSanitizer watches.
#pragma once
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

namespace gan::testing {

class GuardedMemory {
 public:
  explicit GuardedMemory(uint64_t bytes)
      : bytes_(bytes), all_(new (std::align_val_t{kAlignment}) uint8_t[bytes + 2 * kGuardBytes]) {
    std::memset(all_.get(), kGuardByte, bytes + 2 * kGuardBytes);
#ifdef __SANITIZE_ADDRESS__
    __asan_poison_memory_region(all_.get(), kGuardBytes);
    __asan_poison_memory_region(data() + bytes, kGuardBytes);
#endif
  }
  GuardedMemory(GuardedMemory&&) = default;
  GuardedMemory& operator=(GuardedMemory&&) = default;

  uint8_t* data() const { return all_.get() + kGuardBytes; }
  uint64_t bytes() const { return bytes_; }
  bool guards_are_intact() const {
    allow_guards();
    for (uint64_t i = 0; i < kGuardBytes; ++i) {
      if (all_[i] != kGuardByte || data()[bytes_ + i] != kGuardByte) return false;
    }
    return true;
  }

 private:
  static constexpr size_t kAlignment = 256;
  static constexpr uint64_t kGuardBytes = 256;
  static constexpr uint8_t kGuardByte = 0xa5;
  struct Delete {
    void operator()(uint8_t* memory) const {
      ::operator delete[](memory, std::align_val_t{kAlignment});
    }
  };

  void allow_guards() const {
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(all_.get(), bytes_ + 2 * kGuardBytes);
#endif
  }

  uint64_t bytes_;
  std::unique_ptr<uint8_t[], Delete> all_;
};

}  // namespace gan::testing
