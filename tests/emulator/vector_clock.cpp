// Epochs in shared arrays: see vector_clock.h.
#include "vector_clock.h"

#include <algorithm>
#include <cstring>
#include <new>

namespace gan::emulator {
namespace {

constexpr uint32_t kSizeClasses = 32;
constexpr uint32_t kSmallestSize = 64;

}  // namespace

// Spare ones are kept, a list for each power of two: they come and go with every barrier.
static void* spare_epochs[kSizeClasses];

Knowledge::Epochs* Knowledge::make(uint32_t size) {
  uint32_t size_class = 0;
  while ((kSmallestSize << size_class) < size) ++size_class;
  auto* epochs = static_cast<Epochs*>(spare_epochs[size_class]);
  if (epochs != nullptr) {
    spare_epochs[size_class] = epochs->next_spare;
  } else {
    const size_t room = size_t{kSmallestSize} << size_class;
    epochs = static_cast<Epochs*>(::operator new(sizeof(Epochs) + room * sizeof(uint32_t)));
  }
  epochs->references = 1;
  epochs->size = size;
  epochs->size_class = size_class;
  return epochs;
}

void Knowledge::forget() {
  if (epochs_ == nullptr) return;
  if (--epochs_->references == 0) {
    epochs_->next_spare = static_cast<Epochs*>(spare_epochs[epochs_->size_class]);
    spare_epochs[epochs_->size_class] = epochs_;
  }
  epochs_ = nullptr;
}

void Knowledge::own(uint32_t size) {
  const uint32_t old_size = epochs_ != nullptr ? epochs_->size : 0;
  if (epochs_ != nullptr && epochs_->references == 1 && old_size >= size) return;
  Epochs* mine = make(std::max(size, old_size));
  if (old_size != 0) std::memcpy(mine->at(), epochs_->at(), old_size * sizeof(uint32_t));
  if (mine->size > old_size) {
    std::memset(mine->at() + old_size, 0, (mine->size - old_size) * sizeof(uint32_t));
  }
  forget();
  epochs_ = mine;
}

void Knowledge::learn(uint32_t thread, uint32_t epoch) {
  if (of(thread) >= epoch) return;
  own(thread + 1);
  epochs_->at()[thread] = epoch;
}

void Knowledge::learn(const Knowledge& other) {
  if (other.epochs_ == nullptr || other.epochs_ == epochs_) return;
  if (epochs_ == nullptr) {
    *this = other;
    return;
  }
  const uint32_t common = std::min(epochs_->size, other.epochs_->size);
  const uint32_t* theirs = other.epochs_->at();
  const uint32_t* mine = epochs_->at();
  uint32_t all_theirs = epochs_->size <= other.epochs_->size, all_mine = 1;
  for (uint32_t i = 0; i < common; ++i) {
    all_theirs &= theirs[i] >= mine[i];
    all_mine &= theirs[i] <= mine[i];
  }
  if (all_theirs != 0) {
    *this = other;
  } else if (all_mine == 0 || other.epochs_->size > epochs_->size) {
    own(other.epochs_->size);
    uint32_t* merged = epochs_->at();
    for (uint32_t i = 0; i < other.epochs_->size; ++i) merged[i] = std::max(merged[i], theirs[i]);
  }
}

}  // namespace gan::emulator
