// What the threads of a block, a warp or a cluster wait for together.
#include <cstring>

#include "sanitizers.h"
#include "world.h"

namespace gan::emulator {

static bool same(const Site& a, const Site& b) {
  return a.line == b.line && (a.file == b.file || std::strcmp(a.file, b.file) == 0);
}

// True for the last of `all` threads to come.
bool World::State::arrive(Barrier& barrier, uint32_t all, uint32_t finished, Site site) {
  Thread& thread = *current;
  thread.site = site;
  thread.watched_count = 0;
  if (finished != 0) {
    fail_here("waits for all threads of a group of which " + std::to_string(finished) +
                  " have left the kernel",
              site);
  }
  if (barrier.arrived != 0 && !same(barrier.site, site)) {
    fail_here("waits for threads that wait at " + describe(barrier.site) + ": they diverge", site);
  }
  barrier.site = site;
  if (++barrier.arrived != all) return false;
  barrier.arrived = 0;
  note_progress();
  return true;
}

void World::State::let_go_on(Block& block, uint32_t first, uint32_t count, Status status) {
  for (uint32_t i = first; i < first + count; ++i) {
    if (block.threads[i].status == status) make_ready(block.threads[i]);
  }
}

// What a thread brings to a barrier that orders memory, and what it takes from it.
static void bring(World::State& world, Barrier& barrier) {
  release(&barrier);
  if (!world.keeps_clocks()) return;
  barrier.gathering.add(world.current->clock);
  barrier.fenced.learn(world.current->fenced);
}
static void pass(Barrier& barrier) {
  barrier.passed = barrier.gathering.take();
  barrier.passed_fenced = std::move(barrier.fenced);
}
static void take(World::State& world, Barrier& barrier) {
  acquire(&barrier);
  if (!world.keeps_clocks()) return;
  // All that the thread knew is among what it brought.
  world.current->clock.others = barrier.passed;
  world.current->fenced = barrier.passed_fenced;
}

void block_barrier(Site site) {
  const Quiet quiet;
  World::State& world = *running;
  Block& block = *world.current->block;
  const auto all = static_cast<uint32_t>(block.threads.size());
  bring(world, block.barrier);
  if (world.arrive(block.barrier, all, block.finished_threads, site)) {
    pass(block.barrier);
    world.let_go_on(block, 0, all, Status::kBlockSync);
  } else {
    world.wait(Status::kBlockSync);
  }
  take(world, block.barrier);
}

// With all lanes; true for the last to come.
static bool meet_in_warp(Status status, Site site) {
  World::State& world = *running;
  const Thread& thread = *world.current;
  Block& block = *thread.block;
  Warp& warp = block.warps[thread.index / kLanes];
  if (block.threads.size() % kLanes != 0) world.fail_here("waits for part of a warp", site);
  if (!world.arrive(warp.barrier, kLanes, warp.finished_lanes, site)) return false;
  world.let_go_on(block, thread.index / kLanes * kLanes, kLanes, status);
  return true;
}

void warp_barrier(Site site) {
  const Quiet quiet;
  World::State& world = *running;
  const Thread& thread = *world.current;
  Barrier& barrier = thread.block->warps[thread.index / kLanes].barrier;
  bring(world, barrier);
  if (meet_in_warp(Status::kWarpSync, site)) {
    pass(barrier);
  } else {
    world.wait(Status::kWarpSync);
  }
  take(world, barrier);
}

// It orders nothing: a shuffle is no barrier of memory.
uint32_t exchange_in_warp(uint32_t bits, uint32_t lane_mask, Site site) {
  const Quiet quiet;
  World::State& world = *running;
  const Thread& thread = *world.current;
  Warp& warp = thread.block->warps[thread.index / kLanes];
  const uint32_t lane = thread.index % kLanes;
  // Two, in turn: a lane may be at the next exchange before others have read of this one.
  uint32_t* brought = warp.bits[warp.exchanges % 2];
  brought[lane] = bits;
  if (meet_in_warp(Status::kShuffle, site)) {
    ++warp.exchanges;
  } else {
    world.wait(Status::kShuffle);
  }
  return brought[(lane ^ lane_mask) % kLanes];
}

// It orders nothing: its arrival is relaxed.
void cluster_barrier(Site site) {
  const Quiet quiet;
  World::State& world = *running;
  Block& own = *world.current->block;
  Grid& grid = *own.grid;
  Team& team = grid.teams[own.team];
  const uint32_t blocks = grid.launch.cluster_blocks;
  uint32_t finished = 0;
  for (uint32_t i = 0; i < blocks; ++i) {
    finished += grid.blocks[team.first_block + i]->finished_threads;
  }
  if (world.arrive(team.barrier, blocks * grid.launch.threads, finished, site)) {
    for (uint32_t i = 0; i < blocks; ++i) {
      Block& block = *grid.blocks[team.first_block + i];
      world.let_go_on(block, 0, grid.launch.threads, Status::kClusterStart);
    }
  } else {
    world.wait(Status::kClusterStart);
  }
}

}  // namespace gan::emulator
