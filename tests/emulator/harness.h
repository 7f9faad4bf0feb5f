// Runs a case in a World and says what is wrong with what it leaves.
//
// Checked is that
//   - every buffer of every rank holds, after every repeat, what the contract says, bit for bit;
//   - every word of every inbox is empty at the end;
//   - all copies of the call number are equal and right;
//   - no rank has reported a failure;
//   - nothing was written beyond any memory.
#pragma once
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "cases.h"
#include "device/inbox.h"
#include "engine.h"
#include "memory.h"

namespace gan::testing {

using Bytes = std::vector<uint8_t>;

// What a rank has.
struct RankMemory {
  GuardedMemory inbox;
  GuardedMemory host_failure;
  std::vector<GuardedMemory> buffers;

  InboxHeader& header() const { return *reinterpret_cast<InboxHeader*>(inbox.data()); }
  uint64_t failure_bits() const { return *reinterpret_cast<const uint64_t*>(host_failure.data()); }
};

// The buffers of all ranks, [rank][buffer].
using Contents = std::vector<std::vector<Bytes>>;

class Harness {
 public:
  static constexpr uint64_t kTimeoutNs = 500'000'000;

  // Memory of its own for the case, at the state before its first call. `world_ranks`: where in the
  // world each of its ranks runs; none: all of them, in their order.
  explicit Harness(const Case& c, std::vector<uint32_t> world_ranks = {});

  // Once more the state before the first call, in the same memory.
  void start_again();
  // All repeats of all calls on all ranks.
  void queue_all(emulator::World& world);
  // One call on one rank, in the order of the rank's calls.
  void queue(emulator::World& world, uint32_t rank, const Call& call);

  // A kernel on one block, in the order of the rank's calls.
  void queue_block(emulator::World& world, uint32_t rank, uint32_t stream, uint32_t threads,
                   std::function<void()> kernel);

  // After a run without failures: empty, or what is wrong.
  std::string wrong() const;

  // Parts of wrong().
  std::string wrong_contents(uint32_t rank, const Contents& expected) const;
  std::string wrong_header(uint32_t rank) const;
  std::string wrong_inbox(uint32_t rank) const;
  std::string wrong_guards(uint32_t rank) const;

  uint32_t ranks() const { return case_.ranks; }
  const RankMemory& memory(uint32_t rank) const { return memory_[rank]; }
  const InboxLayout& layout() const { return layout_; }
  const ExchangeParams& exchange(uint32_t rank) const { return exchange_[rank]; }
  // What the contract says of the buffers at the end of a repeat.
  const Contents& expected(uint32_t repeat) const { return expected_[repeat]; }

 private:
  RowParams row_params(uint32_t rank, const Call& call, const CallLaunch& launch) const;
  void launch(emulator::World& world, emulator::Launch launch, std::function<void()> kernel);
  void queue_change_of_repeat(emulator::World& world, uint32_t rank, uint32_t repeat);
  void change_repeat(uint32_t rank, uint32_t repeat);

  const Case& case_;
  const std::vector<uint32_t> world_ranks_;
  InboxLayout layout_;
  std::vector<RankMemory> memory_;
  std::vector<ExchangeParams> exchange_;
  std::vector<uint32_t> last_stream_;          // of a rank
  std::vector<Contents> at_start_, expected_;  // of a repeat
  std::vector<std::string> wrong_in_repeat_;   // of a rank, by its own threads
};

// The buffers as the seed of the case has them before a repeat.
Contents random_contents(const Case& c, uint32_t repeat);
// What the contract makes of them by one call.
void apply(const Case& c, const Call& call, Contents& contents);
// The first element of a buffer that is not the expected one, in words; empty: none.
std::string difference(const Case& c, uint32_t buffer, const uint8_t* got, const Bytes& expected);

// Empty, or what is wrong.
std::string run_once(Harness& harness, const emulator::Options& options);
std::string run_case(const Case& c, const emulator::Options& options);

}  // namespace gan::testing
