// Vector clocks over the steps of a path: see path_order.h.
#include "path_order.h"

#include <algorithm>
#include <functional>

namespace gan::emulator {

const PendingAccess* Node::pending_of(uint32_t thread) const {
  for (const PendingAccess& access : pending) {
    if (access.thread == thread) return &access;
  }
  return nullptr;
}

bool conflict(const PendingAccess& a, const PendingAccess& b) {
  return (a.writes || b.writes) && a.address < b.address + b.bytes &&
         b.address < a.address + a.bytes;
}

void PathOrder::number_threads(const std::vector<Node>& path, size_t length) {
  constexpr uint32_t kNone = UINT32_MAX;
  for (const ThreadSteps& thread : threads_) number_of_thread_[thread.thread] = kNone;
  threads_.clear();
  thread_of_step_.clear();
  for (size_t step = 0; step < length; ++step) {
    const uint32_t thread = path[step].step.thread;
    if (thread >= number_of_thread_.size()) number_of_thread_.resize(thread + 1, kNone);
    uint32_t& number = number_of_thread_[thread];
    if (number == kNone) {
      number = static_cast<uint32_t>(threads_.size());
      threads_.push_back({thread, {}, {}});
    }
    thread_of_step_.push_back(number);
  }
}

void PathOrder::join(size_t step, size_t earlier) {
  uint32_t* clock = &clocks_[step * threads_.size()];
  const uint32_t* other = clock_of(earlier);
  for (size_t i = 0; i < threads_.size(); ++i) clock[i] = std::max(clock[i], other[i]);
}

void PathOrder::analyse(const std::vector<Node>& path, size_t length, size_t first_new) {
  ++path_;
  races_.clear();
  number_threads(path, length);
  clocks_.assign(length * threads_.size(), 0);
  for (size_t step = 0; step < length; ++step) {
    const Node& node = path[step];
    ThreadSteps& thread = threads_[thread_of_step_[step]];
    if (!thread.steps.empty()) join(step, thread.steps.back());
    order_after_synchronised(node, step);
    order_after_conflicting(node, step, step >= first_new);
    clocks_[step * threads_.size() + thread_of_step_[step]] = static_cast<uint32_t>(step) + 1;
    thread.steps.push_back(step);
    thread.epochs.push_back(node.clock.epoch);
  }
}

// For each other thread, the last step that the clock knows of.
void PathOrder::order_after_synchronised(const Node& node, size_t step) {
  for (size_t i = 0; i < threads_.size(); ++i) {
    const ThreadSteps& other = threads_[i];
    if (i == thread_of_step_[step]) continue;
    for (size_t k = other.steps.size(); k-- > 0;) {
      if (is_before(other.steps[k], step)) break;
      if (!node.clock.knows(other.thread, other.epochs[k])) continue;
      join(step, other.steps[k]);
      break;
    }
  }
}

PathOrder::Word& PathOrder::word_at(uintptr_t address) {
  const auto [found, is_new] = word_index_.emplace(address, words_.size());
  if (is_new) words_.emplace_back();
  Word& word = words_[found->second];
  if (word.path != path_) {
    word.path = path_;
    word.last_write = SIZE_MAX;
    word.reads.clear();
  }
  return word;
}

void PathOrder::order_after_conflicting(const Node& node, size_t step, bool is_new) {
  conflicting_.clear();
  for (uint32_t byte = 0; byte < node.step.bytes; byte += 4) {
    Word& word = word_at(node.step.address + byte);
    if (word.last_write != SIZE_MAX) conflicting_.push_back(word.last_write);
    if (node.step.writes) {
      conflicting_.insert(conflicting_.end(), word.reads.begin(), word.reads.end());
      word.reads.clear();
      word.last_write = step;
    } else {
      word.reads.push_back(step);
    }
  }
  // The latest first: it may put earlier ones in order.
  std::sort(conflicting_.begin(), conflicting_.end(), std::greater<size_t>());
  for (const size_t earlier : conflicting_) {
    if (is_before(earlier, step)) continue;
    if (is_new) races_.push_back({earlier, step});
    join(step, earlier);
  }
}

}  // namespace gan::emulator
