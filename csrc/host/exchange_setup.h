// What a rank's kernels are told of the exchange, from where all inboxes are mapped. Plain
// arithmetic, without CUDA: the emulator's tests use it too, so they test these addresses.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "device/inbox.h"
#include "device/params.h"

namespace gan {

// Ticks that last `timeout_ns` at least, as far as ticks go.
inline uint32_t timeout_ticks_of(uint64_t timeout_ns) {
  const uint64_t part = timeout_ns % (uint64_t{1} << kTickBits) != 0;
  const uint64_t ticks = (timeout_ns >> kTickBits) + part;
  return static_cast<uint32_t>(std::clamp<uint64_t>(ticks, 1, kMaxTimeoutTicks));
}

// Who waits for a rank that may be waiting itself lets that one's deadline end first, though it
// came to the call later: by as much as the timeout, but no more than a second.
inline uint32_t owner_grace_of(uint32_t timeout_ticks) {
  return std::min<uint32_t>(timeout_ticks, 1'000'000'000 >> kTickBits);
}

// Of a launch of so many rows by so many teams. Where no team has a second row, none is pushed
// ahead.
inline TwoShotParams two_shot_params(uint32_t ranks, uint32_t rows, uint32_t row_packs,
                                     uint32_t teams, uint32_t lead_rows) {
  const uint32_t strips = strips_of_slice(row_packs, ranks);
  const uint32_t later_rows = (rows - 1) / teams;  // of a team, at most
  return {std::min(lead_rows, later_rows), strips, two_shot_hop(rows, strips, ranks - 1)};
}

// `inboxes`: by rank, as mapped in this process, the own one among them.
inline ExchangeParams exchange_params(const InboxLayout& layout, uint32_t rank,
                                      const std::vector<uint8_t*>& inboxes, uint32_t timeout_ticks,
                                      uint64_t* host_failure) {
  ExchangeParams exchange{};
  exchange.inbox = inboxes[rank];
  exchange.stage_bytes = layout.stage_bytes;
  exchange.rank = rank;
  exchange.poll = inboxes[rank] + layout.area_offset(0);
  for (uint32_t i = 0; i < layout.ranks - 1; ++i) {
    // Each rank begins its pushes with the next one, so that they do not all go to the same.
    const uint32_t peer = (rank + 1 + i) % layout.ranks;
    exchange.push[i] = inboxes[peer] + layout.area_offset(area_of_source(rank, peer));
  }
  exchange.timeout_ticks = timeout_ticks;
  exchange.owner_grace_ticks = owner_grace_of(timeout_ticks);
  exchange.host_failure = host_failure;
  std::fill_n(exchange.peer_inbox, kMaxRanks, inboxes[rank]);
  std::copy(inboxes.begin(), inboxes.end(), exchange.peer_inbox);
  return exchange;
}

}  // namespace gan
