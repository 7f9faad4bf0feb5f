// What must be true of calls, reports and inboxes after a fault: fault_run.h lists it.
#include <algorithm>
#include <optional>

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
  bool right = true, nan = true, nan_by_contract = true, each_right_or_nan = true;
  const uint64_t offset = row * row_bytes_of(call);
  for (const uint32_t buffer : {call.norm_out, call.residual_out}) {
    const uint8_t* got = harness_.memory(rank).buffers[buffer].data() + offset;
    const uint8_t* expected = harness_.expected(0)[rank][buffer].data() + offset;
    for (uint32_t i = 0; i < hidden_of(case_, call); ++i) {
      const bool is_right = same_element(case_.dtype, got, expected, i);
      const bool is_nan = is_nan_element(case_.dtype, got, i);
      right = right && is_right;
      nan = nan && is_nan;
      each_right_or_nan = each_right_or_nan && (is_right || is_nan);
      if (buffer == call.norm_out)
        nan_by_contract = nan_by_contract && is_nan_element(case_.dtype, expected, i);
    }
  }
  return {right, nan, nan_by_contract && each_right_or_nan};
}

std::string FaultRun::wrong_rows(uint32_t rank) const {
  std::vector<std::vector<RowState>> rows;  // of exchanges_
  for (size_t i = 0; i < first_calls_; ++i) {
    const Call& call = case_.calls[i];
    for (const CallLaunch& launch : launches_of(case_, call)) {
      std::vector<RowState> states;
      for (uint64_t row = launch.first_row; row < launch.first_row + launch.rows; ++row) {
        states.push_back(state_of_row(rank, call, row));
        const bool is_legal = kKernels[call.kernel].exchanges() && has_failed(rank)
                                  ? states.back().is_legal()
                                  : states.back().is_right;
        if (is_legal) continue;
        return "call " + std::to_string(i) + ", row " + std::to_string(row) +
               ": neither right nor, after a reported failure, NaN";
      }
      if (kKernels[call.kernel].exchanges()) rows.push_back(states);
    }
  }
  return has_failed(rank) ? wrong_order(rank, rows) : "";
}

// Right calls, one call of which some rows at least are NaN, calls of which all are.
std::string FaultRun::wrong_order(uint32_t rank,
                                  const std::vector<std::vector<RowState>>& rows) const {
  const auto any = [](const std::vector<RowState>& states, bool (RowState::*is_so)() const) {
    return std::any_of(states.begin(), states.end(),
                       [=](const RowState& state) { return (state.*is_so)(); });
  };
  const auto all_nan = [](const std::vector<RowState>& states) {
    return std::all_of(states.begin(), states.end(),
                       [](const RowState& state) { return state.is_nan; });
  };
  const auto first = [&](bool (RowState::*is_so)() const) {
    const auto found = std::find_if(rows.begin(), rows.end(),
                                    [&](const auto& states) { return any(states, is_so); });
    return static_cast<size_t>(found - rows.begin());
  };
  if (first(&RowState::may_be_failed) == rows.size())
    return "a failure is reported, but no row is NaN";
  // Or before, where nobody can tell.
  const size_t failed = first(&RowState::is_failed);
  for (size_t later = failed + 1; later < rows.size(); ++later) {
    if (!all_nan(rows[later])) return "a call after the failed one has a row that is not NaN";
  }
  if (fault_ != Fault::kNeverComes) return "";
  size_t missing = 0;
  while (exchanges_[missing].call_index < missing_from_) ++missing;
  if (failed < missing) return "failed before the rank was missing";
  if (!all_nan(rows[missing]))
    return "a row is not NaN although rank " + std::to_string(culprit_) + " was missing";
  const FailureRecord record = FailureRecord::of(harness_.memory(rank).failure_bits());
  if (record.call != case_.first_call + static_cast<uint32_t>(missing))
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
                 fails_as_reported(r, record) &&
                 (!is_dead(record.peer) || is_missing(r, record, exchanges_[index]));
  }
  return found_out ? "" : "nobody misses what the report names";
}

// Whether the rank may be the one that made the report: it has failed in the call and in the row.
bool FaultRun::fails_as_reported(uint32_t rank, const FailureRecord& record) const {
  const uint32_t index = record.call - case_.first_call;
  for (uint32_t i = 0; i <= index; ++i) {
    const Exchange& exchange = exchanges_[i];
    for (uint64_t row = 0; row < exchange.launch.rows; ++row) {
      const RowState state = state_of_row(rank, *exchange.call, exchange.launch.first_row + row);
      if (i < index && state.is_failed()) return false;
      if (i == index && row == record.row && !state.may_be_failed()) return false;
    }
  }
  return true;
}

// The first of exchanges_ in which the rank has a row that is NaN.
size_t FaultRun::first_failed(uint32_t rank) const {
  for (size_t i = 0; i < exchanges_.size(); ++i) {
    const Exchange& exchange = exchanges_[i];
    const uint64_t first = exchange.launch.first_row;
    for (uint64_t row = first; row < first + exchange.launch.rows; ++row) {
      if (state_of_row(rank, *exchange.call, row).may_be_failed()) return i;
    }
  }
  return exchanges_.size();
}

// How far from the first place of its area a pack of a row is that `source` sends `reader`, or its
// sum; none where it sends neither.
static std::optional<uint64_t> place_in_area(const Exchange& exchange, uint32_t ranks,
                                             uint32_t source, uint32_t reader, uint32_t row,
                                             uint32_t pack) {
  const uint32_t row_packs = exchange.call->row_packs;
  if (exchange.launch.shape.algorithm == Algorithm::kOneShot)
    return one_shot_slot(row, pack, row_packs, ranks - 1);
  const uint32_t slice = slice_of_pack(pack, row_packs, ranks);
  const uint32_t teams = exchange.launch.shape.teams;
  const uint32_t owner = owner_of_slice(slice, row % teams + row / teams, ranks);
  const uint32_t longest = strips_of_slice(row_packs, ranks);
  const uint64_t slot =
      two_shot_slot(row, pack - first_pack_of_slice(slice, row_packs, ranks), longest, ranks - 1);
  if (owner == reader) return slot;
  if (owner == source)
    return slot + two_shot_hop(static_cast<uint32_t>(exchange.launch.rows), longest, ranks - 1);
  return std::nullopt;
}

// Whether some of what the missing rank sends of the row that a rank's report names is not in its
// inbox.
bool FaultRun::is_missing(uint32_t rank, const FailureRecord& record,
                          const Exchange& exchange) const {
  const InboxLayout& layout = harness_.layout();
  const uint8_t* area = harness_.memory(rank).inbox.data() +
                        layout.area_offset(area_of_source(record.peer, rank)) +
                        record.call % kStages * layout.stage_bytes;
  for (uint32_t pack = 0; pack < exchange.call->row_packs; ++pack) {
    const std::optional<uint64_t> place =
        place_in_area(exchange, case_.ranks, record.peer, rank, record.row, pack);
    if (!place) continue;
    const auto* words = reinterpret_cast<const uint32_t*>(area + *place);
    if (std::find(words, words + kPackBytes / 4, kEmptyWord) != words + kPackBytes / 4) return true;
  }
  return false;
}

std::string FaultRun::all_rows_are_nan(size_t call_index) const {
  const Call& call = case_.calls[call_index];
  for (uint32_t rank = 0; rank < case_.ranks; ++rank) {
    if (is_dead(rank)) continue;
    for (uint64_t row = 0; row < call.rows; ++row) {
      if (state_of_row(rank, call, row).is_nan) continue;
      return "rank " + std::to_string(rank) + ", call " + std::to_string(call_index) + ", row " +
             std::to_string(row) + ": not NaN in a call after the failed one";
    }
  }
  return "";
}

}  // namespace gan::testing
