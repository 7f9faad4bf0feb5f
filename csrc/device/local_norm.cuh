// The epilogue alone, on a row that is already summed: a = x. For one rank, and after an all-reduce
// that was not ours. It is also the floor that the fused kernels are measured against.
//
// Grid: as one_shot, without peers.
// Memory: outputs may be exactly x or residual.
// Synchronisation: the threads of a team wait for each other in each sum of squares.
#pragma once
#include "gpu.cuh"
#include "pack.cuh"
#include "params.h"
#include "row_norm.cuh"

namespace gan {

template <DType kType, bool kOnePack, Form kForm>
GAN_KERNEL local_norm(GAN_KERNEL_PARAMETER LocalNormParams params) {
  const RowParams& rows = params.row;
  auto& segments = block_shared<SegmentSums>();
  const Team team = this_team<kOnePack>(rows);
  RowNorm<kType, kOnePack, kForm> norm(rows, team, segments);
  norm.start();
  grid_dependency_wait(norm.x_address(team.first_row(), 0),
                       norm.residual_address(team.first_row(), 0), norm.weight_address(0));
  if (params.trigger != Trigger::kNever) grid_launch_dependents();

  // Where the thread has one pack of a row, it loads that of the next row while the team waits.
  Pack sum = zero_pack();
  const auto fetch = [&](uint32_t row, uint32_t j) {
    if (!kOnePack) sum = zero_pack();
    if (row >= rows.rows || !norm.in_row(j)) return;
    sum = norm.load_x(row, j);
    norm.expect(row, j);
  };
  if (kOnePack) fetch(team.first_row(), 0);
#pragma unroll 1
  for (uint32_t row = team.first_row(); row < rows.rows; row += team.row_step()) {
    for (uint32_t j = 0; j < team.packs; ++j) {
      if (!kOnePack) fetch(row, j);
      norm.expect_weight(j);
      norm.accept(row, j, sum);
    }
    norm.finish(row, [&] {
      if (kOnePack) fetch(row + team.row_step(), 0);
    });
  }
}

}  // namespace gan
