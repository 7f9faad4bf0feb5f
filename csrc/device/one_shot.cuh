// One-shot: every rank pushes every row to every peer, and each adds all of them itself. One hop,
// so the least latency; it moves ranks - 1 rows for each row, so two hops win when there are many.
//
//   1. Push this rank's packs of all the team's rows to every peer.
//   2. For each row: poll until the packs of all peers are here, add them in rank order and round.
//   3. The epilogue: residual, norm, outputs (row_norm.cuh). While the threads of the team wait for
//      each other's squares:
//   4. Clear what was read.
//   5. Advance the call number, of which most copies have been advanced after 1.
//
// Grid: teams of one block, or of one cluster, take rows team, team + teams, ...; every team has a
// row. Every rank launches the same shape, at most what its GPU can hold at once: a team waits for
// its like on the peers.
//
// Memory: a rank writes its area of each peer's inbox, and reads and clears its own (inbox.h). Own
// rows are neither pushed to itself nor polled. Outputs may be exactly x or residual: a thread
// writes a pack after its last read of it, and all of a team's rows are pushed before its first
// output.
//
// Synchronisation: none between ranks but the data itself (exchange.cuh); the threads of a team
// wait for each other in each sum of squares.
#pragma once
#include "exchange.cuh"
#include "gpu.cuh"
#include "pack.cuh"
#include "params.h"
#include "row_norm.cuh"

namespace gan {

template <DType kType, uint32_t kRanks, bool kOnePack, Form kForm>
GAN_KERNEL one_shot(GAN_KERNEL_PARAMETER FusedParams params) {
  // Beside the packs of seven peers there are no registers for it.
  constexpr bool kWeightEarly = kRanks < kMaxRanks;
  constexpr bool kLoadsAhead = kOnePack && kRanks < kMaxRanks - 1;
  const RowParams& rows = params.row;
  const ExchangeParams& exchange = params.exchange;
  auto& segments = block_shared<SegmentSums>();
  const Team team = this_team<kOnePack>(rows);
  RowNorm<kType, kOnePack, kForm> norm(rows, team, segments);
  norm.start();
  grid_dependency_wait(norm.x_address(team.first_row(), 0),
                       norm.residual_address(team.first_row(), 0), norm.weight_address(0),
                       own_copy(exchange), exchange.poll);
  if (params.trigger == Trigger::kAtStart) grid_launch_dependents();

  // What the thread needs for pack j of a row besides the peers' packs.
  Pack own;
  const auto fetch = [&](uint32_t row, uint32_t j) {
    if (row >= rows.rows || !norm.in_row(j)) return;
    own = norm.load_x(row, j);
    norm.expect(row, j);
    if (kWeightEarly) norm.expect_weight(j);
  };

  // Where the thread has one pack of a row, it fetches all of the first row now, and of another
  // while the team waits in the row before.
  if (kOnePack) fetch(team.first_row(), 0);
  const auto is_here = [&](uint32_t row) {
    return kLoadsAhead || (kOnePack && row == team.first_row());
  };

  Call call = begin_call(exchange);
  // Bytes from the beginning of an area of stage 0 to this thread's pack j of a row.
  const auto slot = [&](uint32_t row, uint32_t j) {
    return call.stage_offset(exchange) +
           one_shot_slot(row, team.pack(j), rows.row_packs, kRanks - 1);
  };

  // 1.
  if (!call.broken) {
    order_calls(team.first_row(), team.pack(0));
    if (kOnePack && norm.in_row(0)) push_to_all<kRanks>(exchange, slot(team.first_row(), 0), own);
#pragma unroll 1
    for (uint32_t row = team.first_row() + (kOnePack ? team.row_step() : 0); row < rows.rows;
         row += team.row_step()) {
      for (uint32_t j = 0; j < team.packs; ++j) {
        if (!norm.in_row(j)) continue;
        push_to_all<kRanks>(exchange, slot(row, j), norm.load_x(row, j));
      }
    }
  } else {
    join_failure();
  }
  if (params.trigger == Trigger::kAfterPush) grid_launch_dependents();
  advance_idle_copies(exchange, call);

  Wait wait;
#pragma unroll 1
  for (uint32_t row = team.first_row(); row < rows.rows; row += team.row_step()) {
    for (uint32_t j = 0; j < team.packs; ++j) {
      Pack sum = norm.before_sum(j);
      if (!is_here(row)) fetch(row, j);
      const uint64_t offset = slot(row, j);
      if (norm.in_row(j)) {
        // 2.
        Pack from[kRanks - 1];
        for (uint32_t polls = 1; !call.broken; ++polls) {
          load_all<kRanks>(exchange, offset, from);
          if (all_full<kRanks>(from)) break;
          call.broken =
              wait.is_over<kRanks>(exchange, polls, call.number, row, {offset, 0, kRanks - 1, 0});
        }
        order_calls(row, team.pack(j));
        if (!call.broken) sum = sum_in_rank_order<kType, kRanks>(exchange.rank, from, own);
      }
      // 3.
      if (!kWeightEarly) norm.expect_weight(j);
      norm.accept(row, j, sum);
      // 4.
      if (norm.in_row(j) && !call.broken) clear_all<kRanks>(exchange, offset);
    }
    const bool has_nan = norm.finish(row, [&] {
      if (kLoadsAhead) fetch(row + team.row_step(), 0);
    });
    if (GAN_UNLIKELY(has_nan) && has_failed(exchange)) {
      // A thread of the team gave up, on this row as far as one can tell: none of it counts, and
      // the team waits no more.
      call.broken = true;
      join_failure();
      norm.spoil(row);
    }
  }
  advance_own_copy(exchange, call);  // 5.
}

}  // namespace gan
