// Which execution comes next: see explorer.h.
#include "explorer.h"

#include <algorithm>
#include <chrono>
#include <unordered_map>
#include <utility>

#include "path_order.h"

namespace gan::emulator {
namespace {

using Threads = std::vector<uint32_t>;  // a small set

bool contains(const Threads& threads, uint32_t thread) {
  return std::find(threads.begin(), threads.end(), thread) != threads.end();
}
void add(Threads& threads, uint32_t thread) {
  if (!contains(threads, thread)) threads.push_back(thread);
}

class Explorer : public Director {
 public:
  uint32_t contended_words(uintptr_t granule) override {
    const auto found = contended_.find(granule);
    return found == contended_.end() ? 0 : found->second;
  }
  void found_contended(uintptr_t granule, uint32_t words) override {
    uint32_t& known = contended_[granule];
    found_more_ |= (words & ~known) != 0;
    known |= words;
  }
  size_t choose(const std::vector<PendingAccess>& pending) override;

  ExploreResult explore(const std::function<std::string(const Options&)>& run_once, double seconds);

 private:
  bool go_to_next();
  void plan(const PathOrder::Race& race);
  void put_to_sleep(Node& node, const Node& parent) const;
  size_t count_contended() const;

  std::unordered_map<uintptr_t, uint32_t> contended_;  // words, by granule
  bool found_more_ = false;

  // Nodes are kept beyond the end of the path, for what their vectors hold.
  std::vector<Node> path_;
  size_t length_ = 0;
  size_t depth_ = 0;      // steps of this execution so far
  size_t first_new_ = 0;  // the first step that was not taken by the execution before
  PathOrder order_;
  std::vector<std::pair<uint32_t, size_t>> first_steps_;
};

size_t Explorer::choose(const std::vector<PendingAccess>& pending) {
  if (depth_ == length_) {
    if (length_ == path_.size()) path_.emplace_back();
    Node& node = path_[length_];
    node.pending = pending;
    node.sleeping.clear();
    node.explored.clear();
    node.to_explore.clear();
    if (length_ > 0) put_to_sleep(node, path_[length_ - 1]);
    const auto awake = std::find_if(pending.begin(), pending.end(), [&](const PendingAccess& a) {
      return !contains(node.sleeping, a.thread);
    });
    if (awake == pending.end()) throw Pruned();
    node.step = *awake;
    node.to_explore.push_back(node.step.thread);
    ++length_;
  }
  Node& node = path_[depth_++];
  for (size_t i = 0; i < pending.size(); ++i) {
    if (pending[i].thread != node.step.thread) continue;
    if (pending[i].address != node.step.address) break;
    node.clock = *pending[i].clock;
    return i;
  }
  throw std::logic_error("explorer: run_once did not do the same twice");
}

void Explorer::put_to_sleep(Node& node, const Node& parent) const {
  for (const Threads* threads : {&parent.sleeping, &parent.explored}) {
    for (const uint32_t thread : *threads) {
      const PendingAccess* access = parent.pending_of(thread);
      if (!conflict(*access, parent.step)) add(node.sleeping, thread);
    }
  }
}

// The other order of two racing steps is explored from where the earlier one was taken, by way of
// the steps that do not come after it.
void Explorer::plan(const PathOrder::Race& race) {
  Node& node = path_[race.earlier];
  // Threads that could go first on that way, and whether one of them will, or has.
  first_steps_.clear();
  uint32_t first = UINT32_MAX;
  for (size_t step = race.earlier + 1; step <= race.later; ++step) {
    if (step != race.later && order_.is_before(race.earlier, step)) continue;
    const uint32_t thread = path_[step].step.thread;
    bool is_first_of_thread = true, goes_first = true;
    for (const auto& [other, other_step] : first_steps_) {
      is_first_of_thread &= other != thread;
      goes_first &= !order_.is_before(other_step, step);
    }
    if (is_first_of_thread) first_steps_.emplace_back(thread, step);
    if (!goes_first) continue;
    // A thread that is not about to take its step, and that nothing on the way has take it, waits
    // for the earlier step itself, in a poll: there is no other order.
    if (node.pending_of(thread) == nullptr) {
      if (step == race.later) return;
      continue;
    }
    if (contains(node.to_explore, thread) || contains(node.sleeping, thread)) return;
    if (first == UINT32_MAX) first = thread;
  }
  if (first != UINT32_MAX) node.to_explore.push_back(first);
}

// To the last node from which something is left to explore.
bool Explorer::go_to_next() {
  for (; length_ > 0; --length_) {
    Node& node = path_[length_ - 1];
    add(node.explored, node.step.thread);
    for (const uint32_t thread : node.to_explore) {
      if (contains(node.explored, thread) || contains(node.sleeping, thread)) continue;
      node.step = *node.pending_of(thread);
      first_new_ = length_ - 1;
      return true;
    }
  }
  return false;
}

size_t Explorer::count_contended() const {
  size_t count = 0;
  for (const auto& [granule, words] : contended_) {
    count += static_cast<size_t>(__builtin_popcount(words));
  }
  return count;
}

ExploreResult Explorer::explore(const std::function<std::string(const Options&)>& run_once,
                                double seconds) {
  using Clock = std::chrono::steady_clock;
  const Clock::time_point start = Clock::now();
  const auto elapsed = [&] { return std::chrono::duration<double>(Clock::now() - start).count(); };
  Options options;
  options.schedule = Schedule::kRoundRobin;
  options.director = this;
  ExploreResult result;
  result.beginnings = 1;
  do {
    depth_ = 0;
    bool is_pruned = false;
    try {
      result.failure = run_once(options);
    } catch (const Pruned&) {
      is_pruned = true;
    }
    if (!result.failure.empty()) break;
    if (std::exchange(found_more_, false)) {
      length_ = first_new_ = 0;
      result.executions = result.pruned = result.depth = 0;
      ++result.beginnings;
      continue;
    }
    ++(is_pruned ? result.pruned : result.executions);
    result.depth = std::max(result.depth, length_);
    order_.analyse(path_, length_, first_new_);
    for (const PathOrder::Race& race : order_.races()) plan(race);
    result.complete = !go_to_next();
  } while (!result.complete && elapsed() < seconds);
  result.contended_words = count_contended();
  result.seconds = elapsed();
  return result;
}

}  // namespace

ExploreResult explore(const std::function<std::string(const Options&)>& run_once, double seconds) {
  return Explorer().explore(run_once, seconds);
}

}  // namespace gan::emulator
