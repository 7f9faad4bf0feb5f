// What must be true of calls, reports and inboxes after a fault: fault_run.h lists it.
#include <algorithm>

#include "contract.h"
#include "device/pack.cuh"
#include "fault_run.h"
#include "kernels.h"

namespace gan::testing {

bool FaultRun::anyone_has_failed() const {
  for (uint32_t rank = 0; rank < case_.ranks; ++rank) {
    if (!is_dead(rank) && has_failed(rank)) return true;
  }
  return false;
}

std::string FaultRun::wrong_after_first_calls() const {
  bool exchanges_while_missing = false;
  for (const Exchange& exchange : exchanges_) {
    exchanges_while_missing |=
        exchange.call_index >= missing_from_ && exchange.call_index < first_calls_;
  }
  const bool must_fail = fault_ == Fault::kNeverComes && exchanges_while_missing;
  for (uint32_t rank = 0; rank < case_.ranks; ++rank) {
    if (is_dead(rank)) continue;
    std::string wrong = "rank " + std::to_string(rank) + ": ";
    if (must_fail && !has_failed(rank)) return wrong + "no failure reported";
    if (fault_ == Fault::kLateInTime && has_failed(rank)) return wrong + "failed, in time";
    for (const std::string& what : {wrong_rows(rank), wrong_report(rank), wrong_record(rank)}) {
      if (!what.empty()) return wrong + what;
    }
    if (const std::string what = harness_.wrong_guards(rank); !what.empty()) return what;
  }
  return "";
}

RowState FaultRun::state_of_row(uint32_t rank, const Call& call, uint64_t row) const {
  bool right = true, all_nan = true;
  const uint64_t offset = row * row_bytes_of(call);
  for (const uint32_t buffer : {call.norm_out, call.residual_out}) {
    const uint8_t* got = harness_.memory(rank).buffers[buffer].data() + offset;
    const uint8_t* expected = harness_.expected(0)[rank][buffer].data() + offset;
    for (uint32_t i = 0; i < hidden_of(case_, call); ++i) {
      right = right && same_element(case_.dtype, got, expected, i);
      all_nan = all_nan && is_nan_element(case_.dtype, got, i);
    }
  }
  return right ? RowState::kRight : all_nan ? RowState::kNan : RowState::kWrong;
}

std::string FaultRun::wrong_rows(uint32_t rank) const {
  std::vector<std::vector<RowState>> rows;  // of exchanges_
  for (size_t i = 0; i < first_calls_; ++i) {
    const Call& call = case_.calls[i];
    for (const CallLaunch& launch : launches_of(case_, call)) {
      std::vector<RowState> states;
      for (uint64_t row = launch.first_row; row < launch.first_row + launch.rows; ++row) {
        states.push_back(state_of_row(rank, call, row));
        const bool is_legal = kKernels[call.kernel].exchanges && has_failed(rank)
                                  ? states.back() != RowState::kWrong
                                  : states.back() == RowState::kRight;
        if (is_legal) continue;
        return "call " + std::to_string(i) + ", row " + std::to_string(row) +
               ": neither right nor, after a reported failure, NaN";
      }
      if (kKernels[call.kernel].exchanges) rows.push_back(states);
    }
  }
  return has_failed(rank) ? wrong_order(rank, rows) : "";
}

// Right calls, one call of which some rows at least are NaN, calls of which all are.
std::string FaultRun::wrong_order(uint32_t rank,
                                  const std::vector<std::vector<RowState>>& rows) const {
  const auto is_nan_row = [](RowState state) { return state == RowState::kNan; };
  const auto has_nan = [&](const std::vector<RowState>& states) {
    return std::any_of(states.begin(), states.end(), is_nan_row);
  };
  const auto failed = std::find_if(rows.begin(), rows.end(), has_nan);
  if (failed == rows.end()) return "a failure is reported, but no row is NaN";
  for (auto later = failed + 1; later != rows.end(); ++later) {
    if (!std::all_of(later->begin(), later->end(), is_nan_row))
      return "a call after the failed one has a row that is not NaN";
  }
  if (fault_ != Fault::kNeverComes) return "";
  const auto index = static_cast<size_t>(failed - rows.begin());
  if (!std::all_of(failed->begin(), failed->end(), is_nan_row))
    return "a row is not NaN although rank " + std::to_string(culprit_) + " was missing";
  if (exchanges_[index].call_index < missing_from_) return "failed before the rank was missing";
  const FailureRecord record = FailureRecord::of(harness_.memory(rank).failure_bits());
  if (record.call != case_.first_call + static_cast<uint32_t>(index))
    return "the report names another call";
  return "";
}

// What a failure leaves, or that nothing is left.
std::string FaultRun::wrong_report(uint32_t rank) const {
  const RankMemory& memory = harness_.memory(rank);
  const uint64_t record = memory.failure_bits();
  const uint32_t failed = record != 0;
  if (memory.header().failure_claim != failed) return "the claim word is wrong";
  for (const CallCopy& copy : memory.header().call) {
    if (copy.failed != failed) return "the failed flag of a call copy is wrong";
    if (copy.number != memory.header().call[0].number) return "the call copies differ";
  }
  for (uint32_t peer = 0; peer < case_.ranks; ++peer) {
    if (harness_.memory(peer).header().board[rank] != record)
      return "the error board of rank " + std::to_string(peer) + " is wrong";
  }
  return "";
}

std::string FaultRun::wrong_record(uint32_t rank) const {
  if (!has_failed(rank)) return "";
  const uint64_t bits = harness_.memory(rank).failure_bits();
  const FailureRecord record = FailureRecord::of(bits);
  const uint32_t index = record.call - case_.first_call;
  if (index >= exchanges_.size()) return "the report names a call that was not made";
  if (record.row >= exchanges_[index].launch.rows) return "the report names a row that was not";
  if (record.peer >= case_.ranks) return "the report names a rank that is not";
  // Or somebody who waited for the missing one in an earlier call, and so did not come either.
  if (fault_ != Fault::kLooksLate && record.peer != culprit_ &&
      (fault_ == Fault::kNeverComes || first_failed(record.peer) >= index)) {
    return "the report names rank " + std::to_string(record.peer) + ", which was there";
  }
  // Somebody else has found out; and what has never come is missing there still.
  bool found_out = false;
  for (uint32_t r = 0; r < case_.ranks; ++r) {
    found_out |= r != record.peer && harness_.memory(r).failure_bits() == bits &&
                 (!is_dead(record.peer) || is_missing(r, record, exchanges_[index]));
  }
  return found_out ? "" : "nobody misses what the report names";
}

// The first of exchanges_ in which the rank has a row that is NaN.
size_t FaultRun::first_failed(uint32_t rank) const {
  for (size_t i = 0; i < exchanges_.size(); ++i) {
    const Exchange& exchange = exchanges_[i];
    const uint64_t first = exchange.launch.first_row;
    for (uint64_t row = first; row < first + exchange.launch.rows; ++row) {
      if (state_of_row(rank, *exchange.call, row) == RowState::kNan) return i;
    }
  }
  return exchanges_.size();
}

// Whether some of the row that a rank's report names is not in its inbox.
bool FaultRun::is_missing(uint32_t rank, const FailureRecord& record,
                          const Exchange& exchange) const {
  const InboxLayout& layout = harness_.layout();
  const uint64_t row_bytes = row_bytes_of(*exchange.call);
  const uint8_t* row = harness_.memory(rank).inbox.data() +
                       layout.area_offset(area_of_source(record.peer, rank)) +
                       record.call % kStages * layout.stage_bytes + record.row * row_bytes;
  const auto* words = reinterpret_cast<const uint32_t*>(row);
  return std::find(words, words + row_bytes / 4, kEmptyWord) != words + row_bytes / 4;
}

std::string FaultRun::all_rows_are_nan(size_t call_index) const {
  const Call& call = case_.calls[call_index];
  for (uint32_t rank = 0; rank < case_.ranks; ++rank) {
    if (is_dead(rank)) continue;
    for (uint64_t row = 0; row < call.rows; ++row) {
      if (state_of_row(rank, call, row) == RowState::kNan) continue;
      return "rank " + std::to_string(rank) + ", call " + std::to_string(call_index) + ", row " +
             std::to_string(row) + ": not NaN in a call after the failed one";
    }
  }
  return "";
}

}  // namespace gan::testing
