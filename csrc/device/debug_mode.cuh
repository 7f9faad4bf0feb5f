// Debug mode: before a call's kernels, the ranks tell each other what they are about to call. Where
// they disagree nobody starts: the call and all later ones are broken (exchange.cuh), and the host
// is told who said what. The same becomes of calls of a workspace that run at the same time, as
// replays of two graphs on two streams do: such calls take the same call number, and mix up each
// other's rows.
//
// Grid: enter_call is one block with a thread for each field of each rank's call, leave_call one
// thread: before and behind a call's kernels in their stream.
//
// Memory: words of every rank's header, and a report in the host's memory. A word has the number of
// the turn beside its value, so that it tells itself whether it has come. There are two places for
// it, taken in turn: a rank may be one turn ahead, and no more, since it needs everybody's words.
//
// Synchronisation: none between ranks but the words themselves, with the deadline of a call. That
// calls do not overlap is the stream's order, which is what is checked.
#pragma once
#include "exchange.cuh"
#include "gpu.cuh"
#include "inbox.h"
#include "params.h"

namespace gan {

GAN_DEVICE bool is_of_turn(uint64_t word, uint32_t turn) {
  return static_cast<uint32_t>(word >> 32) == turn;
}

// Until the word of `rank` is there. False: it does not come, and the failure has been reported.
GAN_DEVICE bool await_word(const ExchangeParams& exchange, uint32_t turn, uint32_t rank,
                           const uint64_t* from, uint64_t* word) {
  constexpr uint32_t kPollsBeforeLook = 64;
  uint32_t deadline = 0;
  for (uint32_t polls = 1;; ++polls) {
    *word = load_relaxed_sys(from);  // pairs with the store of enter_call by that rank
    if (is_of_turn(*word, turn)) return true;
    if (polls % kPollsBeforeLook != 0) continue;
    uint64_t record = reported_failure<kMaxRanks>(exchange);
    if (record == 0) {
      const uint32_t now = static_cast<uint32_t>(clock_ns() >> kTickBits);
      if (polls == kPollsBeforeLook) deadline = now + exchange.timeout_ticks;
      if (static_cast<int32_t>(now - deadline) < 0) continue;
      record = FailureRecord{rank, 0, begin_call(exchange).number}.bits();
    }
    report_failure<kMaxRanks>(exchange, record);
    return false;
  }
}

GAN_KERNEL enter_call(GAN_KERNEL_PARAMETER DebugParams params) {
  struct Shared {
    uint32_t turn;
    bool broken, differs[kMaxRanks * kCallFields];
  };
  auto& shared = block_shared<Shared>();
  const ExchangeParams& exchange = params.exchange;
  const CallSummary& call = params.call;
  DebugReport* const report = params.report;
  InboxHeader* own = header_of(exchange.inbox);
  if (threadIdx.x == 0) {
    if (add_gpu(&own->in_use, 1u) != 0) {
      store_relaxed_sys(&report->overlap, uint64_t{1});
      if (claim_once(&own->failure_claim)) break_later_calls(own);
    }
    // The header starts as zeros: there is no turn 0. (After 2^32 calls it would wait in vain.)
    shared.turn = load_relaxed_gpu(&own->turn) + 1;
    store_relaxed_gpu(&own->turn, shared.turn);
    shared.broken = begin_call(exchange).broken;
  }
  block_sync();
  if (shared.broken) return;

  const uint32_t turn = shared.turn, place = turn % kStages;
  const uint32_t rank = threadIdx.x / kCallFields, field = threadIdx.x % kCallFields;
  const uint64_t mine = uint64_t{turn} << 32 | call.at[field];
  // Pairs with the load in await_word of that rank.
  store_relaxed_sys(&header_of(exchange.peer_inbox[rank])->calls[place][exchange.rank][field],
                    mine);
  uint64_t theirs = mine;
  if (await_word(exchange, turn, rank, &own->calls[place][rank][field], &theirs))
    store_relaxed_sys(&report->calls[rank][field], theirs);
  shared.differs[threadIdx.x] = is_of_turn(theirs, turn) && theirs != mine;
  block_sync();
  if (threadIdx.x != 0) return;
  bool any = false;
  for (uint32_t i = 0; i < blockDim.x; ++i) any = any || shared.differs[i];
  if (!any || !claim_once(&own->failure_claim)) return;
  fence_sys();  // who sees this sees the words above
  store_relaxed_sys(&report->differs, uint64_t{1});
  break_later_calls(own);
}

GAN_KERNEL leave_call(uint8_t* inbox) { add_gpu(&header_of(inbox)->in_use, 0u - 1); }

}  // namespace gan
