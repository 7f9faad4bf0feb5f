// Two-shot: every row is cut into a slice for each rank. Every rank pushes the slices of its rows
// to their owners; an owner adds a slice of all ranks and pushes the sum to everyone; everyone does
// the epilogue of every row. Two hops, but 2 (ranks - 1) / ranks rows moved for each row where
// one-shot moves ranks - 1: it wins when there are many rows, or many ranks.
//
//   1. Push this rank's packs of a row to their owners.
//   2. Of a row's packs that this rank owns: poll until those of all peers are here, add them in
//      rank order, round, push the sum to every peer, keep it, and clear what was read.
//   3. Of all packs of a row: poll until the sum is here. The epilogue: residual, norm, outputs
//      (row_norm.cuh). Clear what was read.
//   4. Advance the call number, of which most copies have been advanced after the first push.
//
// A team's rows go through these as through a pipeline: while a row is at 1, those lead_rows
// earlier are at 2, and those before them at 3. So what is pushed is used soon, while it is in the
// L2.
//
// Grid: as one_shot. A row of at least as many packs as ranks has a slice of every rank, so every
// team has sums to make of it; slice s of a team's i-th row belongs to rank (s + team + i) % ranks,
// so that in a few rows all its blocks and warps take part. Shorter rows leave some ranks without a
// slice: they finish by the owners' sums, for which the packs of all ranks were needed.
//
// Memory: two parts of each area (inbox.h), for what comes to the owner and from the owner. An
// owner keeps its sum where the pack of the first area was, so that 3 finds it as it finds the
// others. Outputs may be exactly x or residual: a thread has read its pack of x, for the push and
// for the sum, before it writes a pack of that row.
//
// Synchronisation: none between ranks but the data itself (exchange.cuh); the threads of a team
// wait for each other in each sum of squares. Who waits for a sum waits longer than its owner may
// wait for a peer: so the owner is the one who says who is missing.
#pragma once
#include "exchange.cuh"
#include "gpu.cuh"
#include "inbox.h"
#include "pack.cuh"
#include "params.h"
#include "row_norm.cuh"

namespace gan {

template <DType kType, uint32_t kRanks, bool kOnePack, Form kForm>
GAN_KERNEL two_shot(GAN_KERNEL_PARAMETER FusedParams params) {
  // Beside the packs of five and more peers there are no registers for it.
  constexpr bool kLoadsAhead = kOnePack && kRanks < 6;
  // Nor, in all kernels, for these of RowNorm.
  constexpr FewByThread kFew = kForm == Form::kResidual ? FewByThread::kAlways
                               : kForm == Form::kSandwich && kRanks < kMaxRanks - 1
                                   ? FewByThread::kLast
                                   : FewByThread::kNever;
  constexpr bool kAhead = kRanks < kMaxRanks - 1;
  const RowParams& rows = params.row;
  const ExchangeParams& exchange = params.exchange;
  auto& segments = block_shared<SegmentSums>();
  const Team team = this_team<kOnePack>(rows);
  RowNorm<kType, kOnePack, kForm, kFew, kAhead> norm(rows, team, segments);
  const TwoShotParams& two_shot = params.two_shot;
  const uint32_t lead = two_shot.lead;
  // Whether an owner has its sum at once, in a register, and no other row's before.
  const bool keeps_here = kOnePack && lead == 0;
  norm.start();

  // Where a pack lies: in which slice, and where in it.
  struct Place {
    uint32_t slice, index;
  };
  const auto find_place = [&](uint32_t j) {
    const uint32_t slice = slice_of_pack(team.pack(j), rows.row_packs, kRanks);
    return Place{slice, team.pack(j) - first_pack_of_slice(slice, rows.row_packs, kRanks)};
  };
  const Place only_place = kLoadsAhead ? find_place(0) : Place{};
  const auto place_of = [&](uint32_t j) { return kLoadsAhead ? only_place : find_place(j); };
  // Of the team's i-th row.
  const auto row_at = [&](uint32_t i) { return team.first_row() + i * team.row_step(); };
  const auto owner_of = [&](const Place& place, uint32_t i) {
    return owner_of_slice(place.slice, team.first_row() + i, kRanks);
  };

  grid_dependency_wait(norm.x_address(team.first_row(), 0), own_copy(exchange), exchange.push[0],
                       kLoadsAhead ? norm.residual_address(team.first_row(), 0) : nullptr,
                       kLoadsAhead ? norm.weight_address(0) : nullptr,
                       kLoadsAhead ? exchange.poll : nullptr);
  if (params.trigger == Trigger::kAtStart) grid_launch_dependents();

  // Where the thread has one pack, it loads that of the next row to be pushed ahead of time, and of
  // the first row all that it needs.
  Pack next_x = zero_pack();
  const auto load_next = [&](uint32_t i) {
    if (kLoadsAhead && row_at(i) < rows.rows && norm.in_row(0)) next_x = norm.load_x(row_at(i), 0);
  };
  load_next(0);
  if (kLoadsAhead) norm.expect(team.first_row(), 0);

  Call call = begin_call(exchange);
  // Bytes from the beginning of an area of stage 0 to a pack's place on its way to the owner.
  const auto slot = [&](uint32_t i, const Place& place) {
    return call.stage_offset(exchange) +
           two_shot_slot(row_at(i), place.index, two_shot.slice_strips, kRanks - 1);
  };

  // 1.
  const auto push_row = [&](uint32_t i) {
    for (uint32_t j = 0; j < team.packs; ++j) {
      if (!norm.in_row(j) || call.broken) continue;
      order_calls(row_at(i), team.pack(j));
      const Place place = place_of(j);
      const uint32_t distance = (owner_of(place, i) + kRanks - exchange.rank) % kRanks;
      if (distance == 0) continue;
      push_to_one(exchange, distance, slot(i, place),
                  kLoadsAhead ? next_x : norm.load_x(row_at(i), j));
    }
    load_next(i + 1);
  };

  // 2.
  Wait wait;
  const auto add_row = [&](uint32_t i, Pack& kept) {
#pragma unroll 1
    for (uint32_t j = 0; j < team.packs; ++j) {
      const Place place = place_of(j);
      if (!norm.in_row(j) || owner_of(place, i) != exchange.rank) continue;
      const uint64_t offset = slot(i, place);
      Pack from[kRanks - 1];
      for (uint32_t polls = 1; !call.broken; ++polls) {
        load_all<kRanks>(exchange, offset, from);
        if (all_full<kRanks>(from)) break;
        call.broken = wait.is_over<kRanks>(exchange, polls, call.number, row_at(i),
                                           {offset, 0, kRanks - 1, 0});
      }
      if (call.broken) continue;
      order_calls(row_at(i), team.pack(j));
      const Pack own = norm.load_x(row_at(i), j);  // a second time: it is in the L1
      const Pack sum = sum_in_rank_order<kType, kRanks>(exchange.rank, from, own);
      push_to_all<kRanks>(exchange, offset + two_shot.hop_bytes, sum);
      kept = sum;
      keep_first_clear_rest<kRanks>(exchange, offset, keeps_here ? empty_pack() : sendable(sum));
    }
  };

  // 3.
  const auto finish_row = [&](uint32_t i, const Pack& kept) {
    const uint32_t row = row_at(i);
    for (uint32_t j = 0; j < team.packs; ++j) {
      Pack sum = norm.before_sum(j);
      if (!kLoadsAhead) norm.expect(row, j);
      norm.expect_weight(j);
      const Place place = place_of(j);
      const uint32_t owner = owner_of(place, i);
      const bool is_own = owner == exchange.rank;
      const bool is_here = keeps_here && is_own && norm.in_row(j);
      const uint32_t area = is_own ? 0 : area_of_source(owner, exchange.rank);
      const uint64_t offset = slot(i, place) + (is_own ? 0 : two_shot.hop_bytes);
      if (is_here) {
        if (!call.broken) sum = kept;
      } else if (norm.in_row(j)) {
        for (uint32_t polls = 1; !call.broken; ++polls) {
          sum = load_relaxed_sys(poll_address(exchange, area, offset));
          if (is_full(sum)) break;
          call.broken = wait.is_over<kRanks>(exchange, polls, call.number, row,
                                             {offset, area, 1, exchange.owner_grace_ticks});
        }
        if (call.broken) sum = nan_pack();
        order_calls(row, team.pack(j));
      }
      norm.accept(row, j, sum);
      if (norm.in_row(j) && !is_here && !call.broken) clear_one(exchange, area, offset);
    }
    const bool has_nan = norm.finish(row, [&] {
      if constexpr (kLoadsAhead) {
        if (row_at(i + 1) < rows.rows) norm.expect(row_at(i + 1), 0);
      } else {
        for (uint32_t j = 0; j < team.packs; ++j) {
          norm.prefetch_x(row_at(i + 2 * lead + 1), j);
          norm.prefetch_residual(row_at(i + 1), j);
        }
      }
    });
    if (GAN_UNLIKELY(has_nan) && has_failed(exchange)) {
      // As in one_shot: a thread of the team gave up.
      call.broken = true;
      join_failure();
      norm.spoil(row);
    }
  };

  if (call.broken) join_failure();
  push_row(0);
  if (params.trigger == Trigger::kAfterPush) grid_launch_dependents();
  advance_idle_copies(exchange, call);
  // The step that pushes a team's row i adds row i - lead and finishes row i - 2 lead.
#pragma unroll 1
  for (uint32_t step = 0; row_at(step) < rows.rows + 2 * lead * team.row_step(); ++step) {
    if (step != 0 && row_at(step) < rows.rows) push_row(step);
    Pack kept;  // read only where it was written: in a step that adds the row that it finishes
    if (step >= lead && row_at(step - lead) < rows.rows) add_row(step - lead, kept);
    if (step >= 2 * lead) finish_row(step - 2 * lead, kept);
  }
  advance_own_copy(exchange, call);  // 4.
}

}  // namespace gan
