// Vector clocks: which steps of other threads are ordered before a thread's next step.
//
// Every thread counts epochs; one ends whenever the thread lets others know what it has done so
// far. Most threads know the same, because warps and blocks synchronise all the time, so what they
// know is shared, and copied where it changes.
#pragma once
#include <cstdint>
#include <utility>

namespace gan::emulator {

// The last known epoch of each thread.
class Knowledge {
 public:
  Knowledge() = default;
  Knowledge(const Knowledge& other) : epochs_(other.epochs_) {
    if (epochs_ != nullptr) ++epochs_->references;
  }
  Knowledge(Knowledge&& other) noexcept : epochs_(std::exchange(other.epochs_, nullptr)) {}
  Knowledge& operator=(Knowledge other) noexcept {
    std::swap(epochs_, other.epochs_);
    return *this;
  }
  ~Knowledge() { forget(); }

  uint32_t of(uint32_t thread) const {
    return epochs_ != nullptr && thread < epochs_->size ? epochs_->at()[thread] : 0;
  }
  void learn(uint32_t thread, uint32_t epoch);
  void learn(const Knowledge& other);
  bool shares_with(const Knowledge& other) const { return epochs_ == other.epochs_; }
  void forget();

 private:
  // Of `size` epochs, which follow it in memory.
  struct Epochs {
    uint32_t references, size, size_class;
    Epochs* next_spare;
    uint32_t* at() { return reinterpret_cast<uint32_t*>(this + 1); }
  };
  static Epochs* make(uint32_t size);
  // Makes room for `size` epochs that nobody else has.
  void own(uint32_t size);

  Epochs* epochs_ = nullptr;
};

// What a thread knows, and its own epoch.
struct VectorClock {
  uint32_t thread = 0;
  uint32_t epoch = 1;
  Knowledge others;

  bool knows(uint32_t other, uint32_t other_epoch) const {
    return other == thread ? other_epoch <= epoch : other_epoch <= others.of(other);
  }
};

// What many threads bring together, at a barrier for one.
class Gathering {
 public:
  // All that the thread did so far; a new epoch of it begins.
  void add(VectorClock& clock) {
    if (!last_.shares_with(clock.others)) {
      sum_.learn(clock.others);
      last_ = clock.others;
    }
    sum_.learn(clock.thread, clock.epoch++);
  }
  const Knowledge& sum() const { return sum_; }
  Knowledge take() {
    last_.forget();
    return std::move(sum_);
  }

 private:
  Knowledge sum_, last_;
};

}  // namespace gan::emulator
