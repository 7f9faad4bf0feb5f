// The protocol by which ranks exchange rows: push, poll, clear, and the call they belong to.
//
// Data is the flag. Every word of an idle inbox is kEmptyWord; a sender stores data that never
// equals it; a reader polls until no word of its pack is empty. Who reads, clears: having used a
// pack the reader stores kEmptyWord back, so that between calls the whole inbox is empty, whatever
// was called. In a call that succeeds there is no barrier and no fence.
//
// Two stages are enough. Call k uses stage k % 2. A peer pushes call k + 2 only after it finished
// call k + 1, for which it needed my rows of call k + 1, which I push only after my call k
// completed with its clears. So a push never meets data of an earlier call that has not been read
// and cleared. (A call without rows would break the chain: none is launched.)
//
// The call number lives on the device, so that graph replays count too: one copy for each block,
// because blocks of one call start at different times. Block b reads copy b and advances copies b,
// b + grid, b + 2 * grid, ...: all copies agree after every call, whatever its grid was, and no
// atomic is needed.
//
// A call has one deadline. See Wait for what happens then.
//
// docs/memory-model.md says of every access what it pairs with and what it relies on.
#pragma once
#include "gpu.cuh"
#include "inbox.h"
#include "pack.cuh"
#include "params.h"

namespace gan {

// ---- failure ----

GAN_DEVICE InboxHeader* header_of(uint8_t* inbox) { return reinterpret_cast<InboxHeader*>(inbox); }

// So that this rank's later calls neither push nor wait. Ordered before the next call by the end of
// this kernel. The numbers advance as ever.
GAN_DEVICE void break_later_calls(InboxHeader* own) {
#pragma unroll 1
  for (uint32_t i = 0; i < kMaxBlocks; ++i) store_relaxed_gpu(&own->call[i].failed, 1u);
}

// Reports that `record.peer` is missing: to every peer, so that all fail together and name the same
// rank, to the host, and to this rank's later calls. The first thread of the rank to come here does
// it.
template <uint32_t kRanks>
GAN_DEVICE void report_failure(const ExchangeParams& exchange, uint64_t record) {
  InboxHeader* own = header_of(exchange.inbox);
  if (!claim_once(&own->failure_claim)) return;
  fence_gpu();  // whoever sees a failed flag, below, sees the claim
#pragma unroll 1
  for (uint32_t r = 0; r < kRanks; ++r) {
    // Pairs with the look at the board in reported_failure of rank r.
    store_relaxed_sys(&header_of(exchange.peer_inbox[r])->board[exchange.rank], record);
  }
  store_relaxed_sys(exchange.host_failure, record);
  break_later_calls(own);
}

// What a thread waits for: a pack in each of some areas, at an offset.
struct Awaited {
  uint64_t offset;
  uint32_t first_area, areas;
  uint32_t grace_ticks;  // how far behind the deadline
};

GAN_DEVICE Pack* poll_address(const ExchangeParams& exchange, uint32_t area, uint64_t offset) {
  return reinterpret_cast<Pack*>(exchange.poll + offset + area_distance(area));
}

// The first peer whose pack has not arrived; kRanks: all are here.
template <uint32_t kRanks>
GAN_DEVICE uint32_t missing_rank(const ExchangeParams& exchange, const Awaited& awaited) {
#pragma unroll 1
  for (uint32_t i = 0; i < awaited.areas; ++i) {
    const uint32_t area = awaited.first_area + i;
    if (!is_full(load_relaxed_sys(poll_address(exchange, area, awaited.offset)))) {
      return source_of_area(area, exchange.rank);
    }
  }
  return kRanks;
}

// What a peer has reported, 0 where none has.
template <uint32_t kRanks>
GAN_DEVICE uint64_t reported_failure(const ExchangeParams& exchange) {
  const InboxHeader* own = header_of(exchange.inbox);
  uint64_t record = 0;
#pragma unroll 1
  for (uint32_t r = 0; r < kRanks && record == 0; ++r) {
    // Pairs with the store of report_failure by rank r.
    record = load_relaxed_sys(&own->board[r]);
  }
  return record;
}

// By a thread that has learned of a failure: the team's other blocks, when they see a sum made of
// its NaN, see the claim.
GAN_DEVICE void join_failure() { fence_gpu(); }

// Whether some thread of this rank has reported a failure.
GAN_DEVICE bool has_failed(const ExchangeParams& exchange) {
  return load_relaxed_gpu(&header_of(exchange.inbox)->failure_claim) != 0;
}

// A thread's waiting within one call. The clock is looked at rarely: a poll takes most of a
// microsecond, and reading the clock and the board after each would delay the data. So the deadline
// runs from the thread's first look, which comes with the kPollsBeforeLook-th vain poll for a row.
class Wait {
 public:
  // To be asked after each vain poll, with the number of polls so far. True: stop waiting; the
  // failure has been reported.
  template <uint32_t kRanks>
  GAN_DEVICE bool is_over(const ExchangeParams& exchange, uint32_t polls, uint32_t call,
                          uint32_t row, const Awaited& awaited) {
    constexpr uint32_t kPollsBeforeLook = 64;
    if (!GAN_UNLIKELY(polls % kPollsBeforeLook == 0)) return false;
    uint64_t record = reported_failure<kRanks>(exchange);
    if (record == 0) {
      const uint32_t now = static_cast<uint32_t>(clock_ns() >> kTickBits);
      if (deadline_ == kNoDeadline) deadline_ = (now + exchange.timeout_ticks) | 1u;
      if (static_cast<int32_t>(now - deadline_ - awaited.grace_ticks) < 0) return false;
      const uint32_t missing = missing_rank<kRanks>(exchange, awaited);
      if (missing == kRanks) return false;
      record = FailureRecord{missing, row, call}.bits();
    }
    report_failure<kRanks>(exchange, record);
    join_failure();
    return true;
  }

 private:
  static constexpr uint32_t kNoDeadline = 0;
  uint32_t deadline_ = kNoDeadline;  // in ticks (params.h), odd; a register less than nanoseconds
};

// ---- a call ----

struct Call {
  uint32_t number;
  // An earlier call of this rank failed, or this one has: neither push, nor poll, nor clear; every
  // row is NaN.
  bool broken;

  GAN_DEVICE uint64_t stage_offset(const ExchangeParams& exchange) const {
    return number % kStages != 0 ? exchange.stage_bytes : 0;
  }
};

// This block's.
GAN_DEVICE CallCopy* own_copy(const ExchangeParams& exchange) {
  return &header_of(exchange.inbox)->call[blockIdx.x];
}

// After grid_dependency_wait: until then the copies are the previous call's.
GAN_DEVICE Call begin_call(const ExchangeParams& exchange) {
  const uint2 copy = load_relaxed_gpu(reinterpret_cast<const uint2*>(own_copy(exchange)));
  return {copy.x, copy.y != 0};
}

// All copies advance by one, in two parts. First, with all threads (one alone took 3 us), as soon
// as the call number is known, the copies of no block of this launch: nobody reads them before the
// next, so this costs no time.
GAN_DEVICE void advance_idle_copies(const ExchangeParams& exchange, const Call& call) {
  InboxHeader* own = header_of(exchange.inbox);
  for (uint32_t i = blockIdx.x + (threadIdx.x + 1) * gridDim.x; i < kMaxBlocks;
       i += gridDim.x * blockDim.x) {
    store_relaxed_gpu(&own->call[i].number, call.number + 1);  // wraps: only its parity is used
  }
}
// This block's own copy, after a sum over the block's team: every thread has read it then.
GAN_DEVICE void advance_own_copy(const ExchangeParams& exchange, const Call& call) {
  if (threadIdx.x == 0) store_relaxed_gpu(&own_copy(exchange)->number, call.number + 1);
}

// Relaxed accesses alone leave a gap: formally, nothing orders a rank's clears of call k before a
// peer's pushes of call k + 2 into the same place. The default relies on what GPUs do: stores of a
// completed kernel are performed. A build with GAN_STRICT_ORDER closes the gap by two fences in the
// thread that has the first pack of row 0: before its pushes and after its polls for that row.
#ifdef GAN_STRICT_ORDER
inline constexpr bool kStrictOrder = true;
#else
inline constexpr bool kStrictOrder = false;
#endif
// `pack`: of the row, this thread's.
GAN_DEVICE void order_calls(uint32_t row, uint32_t pack) {
  if (kStrictOrder && row == 0 && pack == 0) fence_sys();
}

// ---- packs ----

// One pack of this rank to the same place in every peer's inbox. `offset`: stage, row and pack, in
// bytes.
template <uint32_t kRanks>
GAN_DEVICE void push_to_all(const ExchangeParams& exchange, uint64_t offset, Pack own) {
  const Pack out = sendable(own);
#pragma unroll
  for (uint32_t i = 0; i < kRanks - 1; ++i) {
    // Pairs with the load in load_all of that peer; a sum with that in two_shot's finish_row.
    store_relaxed_sys(reinterpret_cast<Pack*>(exchange.push[i] + offset), out);
  }
}

// The same to one peer, `distance` ranks further on (1 to kRanks - 1).
GAN_DEVICE void push_to_one(const ExchangeParams& exchange, uint32_t distance, uint64_t offset,
                            Pack own) {
  // Pairs with the load in load_all of that peer.
  store_relaxed_sys(reinterpret_cast<Pack*>(exchange.push[distance - 1] + offset), sendable(own));
}

// One pack of every peer, in the order of areas, as far as they have arrived. No load depends on
// another or on what it brings: all are under way at once.
template <uint32_t kRanks>
GAN_DEVICE void load_all(const ExchangeParams& exchange, uint64_t offset,
                         Pack (&from)[kRanks - 1]) {
#pragma unroll
  for (uint32_t area = 0; area < kRanks - 1; ++area) {
    // Pairs with the store in push_to_all or push_to_one of the peer whose area it is.
    from[area] = load_relaxed_sys(poll_address(exchange, area, offset));
  }
}
template <uint32_t kRanks>
GAN_DEVICE bool all_full(const Pack (&from)[kRanks - 1]) {
  uint32_t largest = largest_word(from[0]);
#pragma unroll
  for (uint32_t area = 1; area < kRanks - 1; ++area)
    largest = larger(largest, largest_word(from[area]));
  return largest != kEmptyWord;
}

// What has been read becomes empty again. Pairs with the pushes of call number + 2 into the same
// place: see "Two stages are enough" above.
GAN_DEVICE void clear_one(const ExchangeParams& exchange, uint32_t area, uint64_t offset) {
  store_relaxed_sys(poll_address(exchange, area, offset), empty_pack());
}
template <uint32_t kRanks>
GAN_DEVICE void clear_all(const ExchangeParams& exchange, uint64_t offset) {
#pragma unroll
  for (uint32_t area = 0; area < kRanks - 1; ++area) clear_one(exchange, area, offset);
}

// As clear_all, but in the first area lies then `first`, for this very thread.
template <uint32_t kRanks>
GAN_DEVICE void keep_first_clear_rest(const ExchangeParams& exchange, uint64_t offset, Pack first) {
  store_relaxed_sys(poll_address(exchange, 0, offset), first);
#pragma unroll
  for (uint32_t area = 1; area < kRanks - 1; ++area) clear_one(exchange, area, offset);
}

// T(sum of the ranks' packs in fp32, in rank order). `from` has the peers' in the order of areas,
// which skips this rank.
template <DType kType, uint32_t kRanks>
GAN_DEVICE Pack sum_in_rank_order(uint32_t rank, const Pack (&from)[kRanks - 1], Pack own) {
  if constexpr (kRanks == 2) {
    return add<kType>(own, from[0]);  // the same bits, in either order
  } else {
    const auto pack_of = [&](uint32_t r) {
      const Pack after = from[r == 0 ? 0 : r - 1], before = from[r == kRanks - 1 ? r - 1 : r];
      return r == rank ? own : r < rank ? before : after;
    };
    Floats<kType> sum = widen<kType>(pack_of(0));
#pragma unroll
    for (uint32_t r = 1; r < kRanks; ++r) {
      const Floats<kType> f = widen<kType>(pack_of(r));
#pragma unroll
      for (uint32_t i = 0; i < Floats<kType>::kCount; ++i) sum.at[i] = add_rn(sum.at[i], f.at[i]);
    }
    return round_to_pack<kType>(sum);
  }
}

}  // namespace gan
