// Faults by chance, and the calls that are made before, while and after.
#include <algorithm>
#include <sstream>

#include "fault_run.h"
#include "kernels.h"
#include "stages.h"
#include "statistics.h"

namespace gan::testing {
namespace {

constexpr const char* kFaultNames[] = {"never comes", "stops half-way", "is late, in time",
                                       "is late, too long", "looks late"};

constexpr size_t kCallsAfter = 2;

// Each call has buffers of its own, so that at the end every result is still there; and the last
// calls have rows and are exchanges.
Case independent_case(uint64_t seed, Limits limits) {
  limits.reads_results = false;
  limits.may_repeat = false;
  limits.min_calls = kCallsAfter + 1;
  limits.last_exchanges = kCallsAfter;
  Case c = random_case(seed, limits);
  Random random(seed ^ 0xfa02);
  c.specials = random.one_in(3) ? Specials::kFew : Specials::kNone;
  return c;
}

Case recovery_case(uint64_t seed, Limits limits, uint32_t ranks) {
  limits.min_ranks = limits.max_ranks = std::max(ranks, kMinRanks);
  return random_case(seed + 1, limits);
}

}  // namespace

FaultRun::FaultRun(uint64_t seed, const Limits& limits)
    : random_(seed ^ 0xfa01),
      case_(independent_case(seed, limits)),
      first_calls_(case_.calls.size() - kCallsAfter),
      fault_(static_cast<Fault>(random_.below(5))),
      culprit_(random_.below(case_.ranks)),
      missing_from_(random_.below(static_cast<uint32_t>(first_calls_))),
      options_(random_options(seed, case_)),
      harness_(case_) {
  for (uint32_t rank = 0; rank < case_.ranks; ++rank) {
    if (!is_dead(rank)) survivors_.push_back(rank);
  }
  recovery_ = recovery_case(seed, limits, static_cast<uint32_t>(survivors_.size()));
  if (options_.resident_blocks != 0)
    options_.resident_blocks = std::max(options_.resident_blocks, most_blocks_of(recovery_));
  options_.time_passes = true;
  options_.weak = random_.one_in(2);
  constexpr uint64_t kLong = 200 * Harness::kTimeoutNs;
  const uint64_t accesses = random_.below(4u << random_.below(12));
  switch (fault_) {
    case Fault::kNeverComes:
      // Another comes late: it still waits when the deadlines of those who wait for it end.
      if (case_.ranks > kMinRanks && random_.one_in(2)) {
        latecomer_ = (culprit_ + 1 + random_.below(case_.ranks - 1)) % case_.ranks;
        options_.stalls = {{latecomer_, accesses, 1 + random_.below(Harness::kTimeoutNs / 2)}};
      }
      break;
    case Fault::kStopsHalfWay:
      options_.stalls = {{culprit_, accesses, emulator::Stall::kForEver}};
      break;
    case Fault::kLateInTime:
      options_.stalls = {{culprit_, accesses, 1 + random_.below(Harness::kTimeoutNs)}};
      break;
    case Fault::kLateTooLong:
      options_.stalls = {{culprit_, accesses, kLong}};
      break;
    case Fault::kLooksLate:
      options_.one_look_late = 1u << random_.below(5);
      options_.eager_rank = culprit_;
      break;
  }
  for (uint32_t i = 0; i < case_.calls.size(); ++i) {
    const Call& call = case_.calls[i];
    if (!kKernels[call.kernel].exchanges()) continue;
    for (const CallLaunch& launch : launches_of(case_, call))
      exchanges_.push_back({&call, launch, i});
  }
}

std::string FaultRun::description() const {
  std::ostringstream text;
  text << describe(case_) << "  rank " << culprit_ << " " << kFaultNames[static_cast<int>(fault_)];
  if (fault_ == Fault::kNeverComes) text << " from call " << missing_from_ << " on";
  text << "; the last " << kCallsAfter << " calls come afterwards; " << describe(options_);
  return text.str();
}

void FaultRun::count_it() const {
  count_case(case_);
  count(std::string("cases where a rank ") + kFaultNames[static_cast<int>(fault_)]);
  if (options_.weak) count("cases of weak memory");
  if (latecomer_ != kNobody) count("cases where another rank is late");
}

// ---- the run ----

void FaultRun::run_calls(emulator::World& world, size_t first, size_t count) {
  for (uint32_t rank = 0; rank < case_.ranks; ++rank) {
    for (size_t i = first; i < first + count; ++i) {
      const bool missing = fault_ == Fault::kNeverComes && rank == culprit_ && i >= missing_from_;
      if (!missing) harness_.queue(world, rank, case_.calls[i]);
    }
  }
  world.run();
}

std::string FaultRun::run() {
  emulator::World world(case_.ranks, options_);
  try {
    run_calls(world, 0, first_calls_);
    std::string wrong = wrong_after_first_calls();
    if (!wrong.empty()) return wrong;
    if (!anyone_has_failed()) return "";
    count(std::string("failures where a rank ") + kFaultNames[static_cast<int>(fault_)]);
    wrong = run_calls_after_failure(world);
    if (!wrong.empty() || survivors_.size() < kMinRanks) return wrong;
    // Looks that are late would end its calls too.
    return fault_ == Fault::kLooksLate ? run_with_new_inboxes() : run_with_new_inboxes(world);
  } catch (const emulator::Failure& failure) {
    return failure.what();
  }
}

// The first of them may still wait, for peers that have failed; the second does nothing.
std::string FaultRun::run_calls_after_failure(emulator::World& world) {
  const uint64_t first_begin = world.now_ns();
  run_calls(world, first_calls_, 1);
  // Who has not failed yet waits until it looks at its error board, not until its own deadline.
  if (fault_ != Fault::kLooksLate && world.now_ns() - first_begin >= Harness::kTimeoutNs)
    return "a whole deadline passes although a failure was reported";
  std::string wrong = all_rows_are_nan(first_calls_);
  if (!wrong.empty()) return wrong;
  for (uint32_t rank = 0; rank < case_.ranks; ++rank) {
    if (is_dead(rank)) continue;
    if (!has_failed(rank)) return "rank " + std::to_string(rank) + " reports no failure";
    if (wrong = wrong_report(rank); !wrong.empty()) return wrong;
  }
  const std::vector<Bytes> before = inbox_copies();
  const uint64_t second_begin = world.now_ns();
  run_calls(world, first_calls_ + 1, 1);
  if (world.now_ns() != second_begin) return "a call after the failed one waits";
  if (inbox_copies() != before) return "a call after the failed one has touched an inbox";
  return all_rows_are_nan(first_calls_ + 1);
}

std::string FaultRun::run_with_new_inboxes(emulator::World& world) const {
  count("recoveries");
  Harness anew(recovery_, survivors_);
  anew.queue_all(world);
  world.run();
  const std::string wrong = anew.wrong();
  return wrong.empty() ? "" : "with new inboxes, " + wrong;
}
std::string FaultRun::run_with_new_inboxes() const {
  emulator::Options options = options_;
  options.one_look_late = 0;
  options.eager_rank = UINT32_MAX;
  emulator::World world(case_.ranks, options);
  return run_with_new_inboxes(world);
}

// Without the call numbers, which go on.
std::vector<Bytes> FaultRun::inbox_copies() const {
  std::vector<Bytes> copies;
  for (uint32_t rank = 0; rank < case_.ranks; ++rank) {
    const GuardedMemory& inbox = harness_.memory(rank).inbox;
    Bytes copy(inbox.data(), inbox.data() + inbox.bytes());
    for (CallCopy& call : reinterpret_cast<InboxHeader*>(copy.data())->call) call.number = 0;
    copies.push_back(std::move(copy));
  }
  return copies;
}

std::string run_fault_case(uint64_t seed, const Limits& limits, std::string& description) {
  FaultRun run(seed, limits);
  description = run.description();
  run.count_it();
  return run.run();
}

}  // namespace gan::testing
