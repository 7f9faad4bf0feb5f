// The order among the steps of an execution, and its races, for the explorer.
#pragma once
#include <cstddef>
#include <cstdint>
#include <unordered_map>
#include <vector>

#include "engine.h"
#include "vector_clock.h"

namespace gan::emulator {

// A state on the path of an execution, and the step that was taken from it.
struct Node {
  std::vector<PendingAccess> pending;  // steps that could be taken
  // Threads:
  std::vector<uint32_t> sleeping;  // what begins with their steps has been explored elsewhere
  std::vector<uint32_t> to_explore, explored;

  PendingAccess step;
  VectorClock clock;  // what barriers and kernel boundaries order before the step

  const PendingAccess* pending_of(uint32_t thread) const;
};

bool conflict(const PendingAccess& a, const PendingAccess& b);

// The least order that has that of each thread, that by barriers and kernel boundaries, and that of
// conflicting steps. A step is known by its place on the path.
class PathOrder {
 public:
  struct Race {
    size_t earlier, later;  // steps that conflict, and that no step between them puts in order
  };
  // Of a new path. Finds the races whose later step is at `first_new` or after.
  void analyse(const std::vector<Node>& path, size_t length, size_t first_new);
  const std::vector<Race>& races() const { return races_; }
  bool is_before(size_t step, size_t later) const {
    return clock_of(later)[thread_of_step_[step]] > step;
  }

 private:
  // Threads that have steps on the path have small numbers here.
  struct ThreadSteps {
    uint32_t thread;  // of the world
    std::vector<size_t> steps;
    std::vector<uint32_t> epochs;  // of the thread, at each step
  };
  struct Word {
    uint64_t path = 0;  // the last one that accessed it
    size_t last_write = SIZE_MAX;
    std::vector<size_t> reads;  // since
  };

  void number_threads(const std::vector<Node>& path, size_t length);
  void order_after_synchronised(const Node& node, size_t step);
  void order_after_conflicting(const Node& node, size_t step, bool is_new);
  Word& word_at(uintptr_t address);

  // [thread]: 1 + the last step of the thread that is before the step, or is it; 0: none.
  const uint32_t* clock_of(size_t step) const { return &clocks_[step * threads_.size()]; }
  void join(size_t step, size_t earlier);

  std::vector<ThreadSteps> threads_;
  std::vector<uint32_t> number_of_thread_;  // by number in the world
  std::vector<uint32_t> thread_of_step_;
  std::vector<uint32_t> clocks_;
  std::unordered_map<uintptr_t, size_t> word_index_;
  std::vector<Word> words_;
  uint64_t path_ = 0;
  std::vector<size_t> conflicting_;
  std::vector<Race> races_;
};

}  // namespace gan::emulator
