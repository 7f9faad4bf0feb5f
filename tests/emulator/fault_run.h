// Ranks that never come, stop half-way or are late, and what docs/design.md ("Deadline and
// failure") promises of it to those that are there:
//
//   - whoever reports no failure has right results in every call;
//   - whoever reports one has right results up to one call, in that call rows that are right or NaN
//     in both outputs, and NaN rows in all calls after it;
//   - the report names a rank that was missing, to everybody, and the same one where it is known;
//     and some rank has failed in the call and the row that it names;
//   - the calls after it neither wait nor touch any inbox;
//   - new inboxes work: of those that are there, while a rank that stopped half-way still stands in
//     its kernel; of all ranks, once a late one has come.
//
// Where the inputs have NaN, a row can be NaN in norm_out by the contract. The threads that see
// this cannot tell it from a failure of which they know, and each takes it for one or not: then
// each element of residual_out is right or NaN.
#pragma once
#include <string>
#include <vector>

#include "cases.h"
#include "harness.h"

namespace gan::testing {

enum class Fault {
  kNeverComes,    // launches nothing from some call on, while another may be late in time
  kStopsHalfWay,  // its threads stand still for ever
  kLateInTime,    // ... until a time before any deadline
  kLateTooLong,   // ... until a time after all deadlines
  kLooksLate,     // deadlines end by chance, of any rank
};

// A row on a rank.
struct RowState {
  bool is_right, is_nan;
  bool is_nan_anyway;  // norm_out is NaN by the contract, and each element of residual_out right or
                       // NaN

  // Of a rank that has failed.
  bool is_legal() const { return is_right || may_be_failed(); }
  bool may_be_failed() const { return is_nan || is_nan_anyway; }
  bool is_failed() const { return may_be_failed() && !is_right; }
};

// A launch that exchanges.
struct Exchange {
  const Call* call;
  CallLaunch launch;
  uint32_t call_index;
};

class FaultRun {
 public:
  FaultRun(uint64_t seed, const Limits& limits);
  std::string description() const;
  void count_it() const;  // in the statistics
  std::string run();

 private:
  bool is_dead(uint32_t rank) const {
    return rank == culprit_ && (fault_ == Fault::kNeverComes || fault_ == Fault::kStopsHalfWay);
  }
  bool has_failed(uint32_t rank) const { return harness_.memory(rank).failure_bits() != 0; }
  bool anyone_has_failed() const;
  void run_calls(emulator::World& world, size_t first, size_t count);
  std::string run_calls_after_failure(emulator::World& world);
  std::string run_with_new_inboxes(emulator::World& world) const;
  std::string run_with_new_inboxes() const;

  std::string wrong_after_first_calls() const;
  std::string wrong_rows(uint32_t rank) const;
  std::string wrong_order(uint32_t rank, const std::vector<std::vector<RowState>>& rows) const;
  std::string wrong_report(uint32_t rank) const;
  std::string wrong_record(uint32_t rank) const;
  size_t first_failed(uint32_t rank) const;
  bool fails_as_reported(uint32_t rank, const FailureRecord& record) const;
  bool is_missing(uint32_t rank, const FailureRecord& record, const Exchange& exchange) const;
  RowState state_of_row(uint32_t rank, const Call& call, uint64_t row) const;
  std::string all_rows_are_nan(size_t call_index) const;
  std::vector<Bytes> inbox_copies() const;

  Random random_;
  Case case_;
  size_t first_calls_;  // the rest comes when the fault has shown
  Fault fault_;
  uint32_t culprit_;
  static constexpr uint32_t kNobody = UINT32_MAX;
  uint32_t latecomer_ = kNobody;  // of kNeverComes: late, but in time
  size_t missing_from_;           // call; of kNeverComes
  std::vector<uint32_t> survivors_;
  Case recovery_;  // with new inboxes, of the survivors
  emulator::Options options_;
  Harness harness_;
  std::vector<Exchange> exchanges_;  // in the order of call numbers
};

}  // namespace gan::testing
