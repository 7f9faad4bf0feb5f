// Debug mode (csrc/device/debug_mode.cuh): each call between its two kernels, and calls without
// rows of which there is nothing else, as Workspace queues them. From some call on a rank announces
// another call than the rest, or makes none.
//
//   - where all announce the same, results are right and nothing is reported;
//   - where one differs, every rank's report says so, with what each rank announced, and from that
//     call on all rows are NaN, on all ranks;
//   - where one does not come, all others fail, name it and the call, and have NaN rows from then
//     on, though nobody reached the call's own kernels;
//   - where one begins a call within another, its report says so, and all have NaN rows from then
//     on, the others as if it did not come.
#include <cstring>
#include <sstream>
#include <vector>

#include "contract.h"
#include "harness.h"
#include "kernels.h"
#include "stages.h"
#include "statistics.h"

namespace gan::testing {
namespace {

enum class Trouble { kNone, kDiffers, kNeverComes, kOverlaps };
constexpr const char* kTroubleNames[] = {"calls what all call", "announces another call",
                                         "never comes", "begins a call within another"};

// Each call has buffers of its own: at the end every result is still there.
Case independent_case(uint64_t seed, Limits limits) {
  limits.reads_results = false;
  limits.may_repeat = false;
  limits.min_calls = 2;
  limits.last_exchanges = 2;
  limits.specials = false;  // NaN is a failed row then
  return random_case(seed, limits);
}

class DebugRun {
 public:
  DebugRun(uint64_t seed, const Limits& limits)
      : random_(seed ^ 0xdeb6),
        case_(independent_case(seed, limits)),
        trouble_(static_cast<Trouble>(random_.below(4))),
        culprit_(random_.below(case_.ranks)),
        field_(random_.below(kCallFields)),
        first_wrong_(random_.below(static_cast<uint32_t>(case_.calls.size()))),
        options_(random_options(seed, case_)),
        harness_(case_) {
    options_.time_passes = leaves_others_waiting();
    options_.weak = random_.one_in(2);
    while (!exchanges(case_.calls[first_wrong_])) ++first_wrong_;  // the last ones do
    for (size_t i = 0; i < case_.calls.size(); ++i) empty_calls_.push_back(random_.below(3));
    for (uint32_t rank = 0; rank < case_.ranks; ++rank) {
      reports_.emplace_back(sizeof(DebugReport));
      std::memset(reports_[rank].data(), 0, sizeof(DebugReport));
    }
  }

  std::string description() const {
    std::ostringstream text;
    text << describe(case_) << "  rank " << culprit_ << " "
         << kTroubleNames[static_cast<int>(trouble_)] << " from call " << first_wrong_
         << " on, field " << field_ << "; " << describe(options_);
    return text.str();
  }

  std::string run() {
    count_case(case_);
    count(std::string("cases where a rank ") + kTroubleNames[static_cast<int>(trouble_)]);
    emulator::World world(case_.ranks, options_);
    try {
      for (uint32_t rank = 0; rank < case_.ranks; ++rank) {
        for (size_t i = 0; i < case_.calls.size(); ++i) {
          if (!is_absent(rank, i)) queue(world, rank, i);
        }
      }
      world.run();
    } catch (const emulator::Failure& failure) {
      return failure.what();
    }
    if (trouble_ == Trouble::kNone) {
      if (std::string wrong = harness_.wrong(); !wrong.empty()) return wrong;
    }
    for (uint32_t rank = 0; rank < case_.ranks; ++rank) {
      if (is_absent(rank, case_.calls.size())) continue;
      for (const std::string& wrong : {wrong_report(rank), wrong_rows(rank)}) {
        if (!wrong.empty()) return "rank " + std::to_string(rank) + ": " + wrong;
      }
    }
    return "";
  }

 private:
  static bool exchanges(const Call& call) { return kKernels[call.kernel].exchanges(); }
  bool leaves_others_waiting() const {
    return trouble_ == Trouble::kNeverComes || trouble_ == Trouble::kOverlaps;
  }
  bool overlaps(uint32_t rank) const { return trouble_ == Trouble::kOverlaps && rank == culprit_; }
  bool is_absent(uint32_t rank, size_t call) const {
    return trouble_ == Trouble::kNeverComes && rank == culprit_ && call >= first_wrong_;
  }
  bool is_broken(size_t call) const {
    return trouble_ != Trouble::kNone && call >= first_wrong_ && exchanges(case_.calls[call]);
  }
  DebugReport& report(uint32_t rank) const {
    return *reinterpret_cast<DebugReport*>(reports_[rank].data());
  }

  CallSummary summary(uint32_t rank, size_t call) const {
    CallSummary summary;
    for (uint32_t f = 0; f < kCallFields; ++f)
      summary.at[f] = static_cast<uint32_t>(7 * call + 31 * f);
    if (trouble_ == Trouble::kDiffers && rank == culprit_ && call >= first_wrong_)
      ++summary.at[field_];
    return summary;
  }

  void queue(emulator::World& world, uint32_t rank, size_t index) {
    const Call& call = case_.calls[index];
    if (!exchanges(call)) return harness_.queue(world, rank, call);
    for (uint32_t i = 0; i < empty_calls_[index]; ++i) {
      announce(world, rank, index, [] {});
    }
    if (overlaps(rank) && index == first_wrong_) enter(world, rank, index);
    announce(world, rank, index, [&] { harness_.queue(world, rank, call); });
  }

  // As Workspace::run and Workspace::announce do.
  template <class Queue>
  void announce(emulator::World& world, uint32_t rank, size_t index, const Queue& queue) {
    enter(world, rank, index);
    queue();
    uint8_t* inbox = harness_.exchange(rank).inbox;
    harness_.queue_block(world, rank, case_.calls[index].stream, 1,
                         [=] { debug_kernels().leave_call(inbox); });
  }
  void enter(emulator::World& world, uint32_t rank, size_t index) {
    const DebugParams params{harness_.exchange(rank), summary(rank, index), &report(rank)};
    harness_.queue_block(world, rank, case_.calls[index].stream, case_.ranks * kCallFields,
                         [=] { debug_kernels().enter_call(params); });
  }

  std::string wrong_report(uint32_t rank) const {
    if (!reports_[rank].guards_are_intact()) return "written beyond the report";
    if ((report(rank).overlap != 0) != overlaps(rank)) return "calls are said to overlap, or not";
    if (harness_.memory(rank).header().in_use != overlaps(rank)) return "calls are left in use";
    const uint64_t failure = harness_.memory(rank).failure_bits();
    if ((report(rank).differs != 0) != (trouble_ == Trouble::kDiffers))
      return "a difference is reported, or one is not";
    if ((failure != 0) != (leaves_others_waiting() && rank != culprit_))
      return "a missing rank is reported, or one is not";
    if (failure != 0) return wrong_record(FailureRecord::of(failure));
    if (trouble_ != Trouble::kDiffers) return "";
    for (uint32_t r = 0; r < case_.ranks; ++r) {
      for (uint32_t f = 0; f < kCallFields; ++f) {
        const auto said = static_cast<uint32_t>(report(rank).calls[r][f]);
        if (said != summary(r, first_wrong_).at[f]) return "not what the ranks announced";
      }
    }
    return "";
  }

  std::string wrong_record(const FailureRecord& record) const {
    uint32_t number = case_.first_call;
    for (size_t i = 0; i < first_wrong_; ++i) {
      if (exchanges(case_.calls[i]))
        number += static_cast<uint32_t>(launches_of(case_, case_.calls[i]).size());
    }
    if (record.peer != culprit_) return "another rank is named";
    return record.call == number ? "" : "another call is named";
  }

  std::string wrong_rows(uint32_t rank) const {
    for (size_t i = 0; i < case_.calls.size(); ++i) {
      const Call& call = case_.calls[i];
      for (const uint32_t buffer : {call.norm_out, call.residual_out}) {
        const uint8_t* got = harness_.memory(rank).buffers[buffer].data();
        const uint8_t* expected = harness_.expected(0)[rank][buffer].data();
        const auto elements = static_cast<uint32_t>(call.rows * hidden_of(case_, call));
        for (uint32_t e = 0; e < elements; ++e) {
          const bool is_right = is_broken(i) ? is_nan_element(case_.dtype, got, e)
                                             : same_element(case_.dtype, got, expected, e);
          if (!is_right) return "call " + std::to_string(i) + ": wrong, or not NaN";
        }
      }
    }
    return "";
  }

  Random random_;
  Case case_;
  Trouble trouble_;
  uint32_t culprit_, field_, first_wrong_;
  std::vector<uint32_t> empty_calls_;  // before a call: announced, and nothing is launched
  emulator::Options options_;
  Harness harness_;
  std::vector<GuardedMemory> reports_;
};

}  // namespace

std::string run_debug_case(uint64_t seed, const Limits& limits, std::string& description) {
  DebugRun run(seed, limits);
  description = run.description();
  return run.run();
}

}  // namespace gan::testing
