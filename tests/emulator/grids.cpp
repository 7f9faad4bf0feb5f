// Blocks, from their start to their end.
#include <algorithm>

#include "sanitizers.h"
#include "world.h"

namespace gan::emulator {

void World::State::start_blocks() {
  blocks_may_start = false;
  for (Rank& rank : ranks) {
    if (rank.stands_still) continue;
    for (Stream& stream : rank.streams) {
      for (size_t i = stream.completed; i < stream.grids.size(); ++i) {
        Grid& grid = *stream.grids[i];
        if (grid.all_started()) continue;
        if (!may_start(stream, grid)) break;
        if (grid.started == 0) set_out(stream, grid);
        const uint32_t size = grid.launch.cluster_blocks;
        while (!grid.all_started() && (options.resident_blocks == 0 ||
                                       rank.running_blocks + size <= options.resident_blocks)) {
          start_team(rank, grid);
        }
        if (!grid.all_started()) break;
      }
    }
  }
}

static const Stream& stream_of(const World::State& world, const Grid& grid) {
  return world.ranks[grid.launch.rank].streams[grid.launch.stream];
}

bool World::State::may_start(const Stream& stream, const Grid& grid) const {
  for (const Grid* event : grid.events) {
    if (stream_of(*this, *event).completed <= event->index) return false;
  }
  if (grid.index == stream.completed) return true;
  if (!grid.overlaps_previous()) return false;
  const Grid& previous = *stream.grids[grid.index - 1];
  return previous.let_next_start == previous.launch.blocks;
}

// What the grid's threads know from their first step. To be let start early orders nothing, so then
// it is what the grid before knew.
void World::State::set_out(const Stream& stream, Grid& grid) {
  if (!keeps_clocks()) return;
  if (grid.overlaps_previous() && grid.index > 0) {
    grid.at_start = stream.grids[grid.index - 1]->at_start;
    return;
  }
  grid.at_start = stream.after_completed;
  for (const Grid* event : grid.events) {
    const Stream& other = stream_of(*this, *event);
    for (uint32_t i = 0; i <= event->index; ++i) {
      grid.at_start.learn(other.grids[i]->end.sum());
    }
  }
}

void World::State::start_team(Rank& rank, Grid& grid) {
  const uint32_t size = grid.launch.cluster_blocks;
  const uint32_t cluster = grid.block_order[grid.started / size];
  grid.teams[cluster].first_block = grid.started;
  for (uint32_t i = 0; i < size; ++i) {
    auto block = std::make_unique<Block>();
    block->grid = &grid;
    block->index = cluster * size + i;
    block->team = cluster;
    block->threads = std::vector<Thread>(grid.launch.threads);
    block->warps = std::vector<Warp>((grid.launch.threads + kLanes - 1) / kLanes);
    for (uint32_t t = 0; t < grid.launch.threads; ++t) {
      Thread& thread = block->threads[t];
      thread.block = block.get();
      thread.index = t;
      thread.number = grid.first_thread + block->index * grid.launch.threads + t;
      thread.clock.thread = thread.number;
      thread.clock.others = grid.at_start;
      make_ready(thread);
    }
    grid.blocks.push_back(std::move(block));
    ++grid.started;
    ++rank.running_blocks;
  }
  note_progress();
}

// ---- threads ----

static void thread_main() {
  Fiber::arrive();
  World::State& world = *running;
  {
    const Quiet quiet;
    world.reuse_ended_fiber();
    acquire(&world);
    const Grid& grid = *world.current->block->grid;
    if (!grid.overlaps_previous()) world.acquire_earlier(grid);
  }
  try {
    world.current->block->grid->kernel();
    const Quiet quiet;
    world.end_thread();
  } catch (...) {
    world.failure = std::current_exception();
  }
  begin_quiet();
  world.leave();
}

void World::State::give_fiber(Thread& thread) {
  const Grid& grid = *thread.block->grid;
  Stream& stream = ranks[grid.launch.rank].streams[grid.launch.stream];
  // ThreadSanitizer takes what two threads do on one fiber to be in order, so a fiber of this
  // stream serves again only for a grid that comes well after.
  const uint32_t distance = grid.overlaps_previous() ? 2 : 1;
  if (!stream.spent.empty() && stream.spent.front().first + distance <= grid.index) {
    thread.fiber = stream.spent.front().second;
    stream.spent.pop_front();
  } else {
    thread.fiber = FiberPool::take();
  }
  thread.fiber->prepare(thread_main);
}

void World::State::end_thread() {
  Thread& thread = *current;
  Block& block = *thread.block;
  Grid& grid = *block.grid;
  if (block.stores_under_way != 0) {
    fail(describe(thread) + ": leaves the kernel while stores of other blocks to its block's " +
         "shared memory are under way");
  }
  Warp& warp = block.warps[thread.index / kLanes];
  for (const Barrier* barrier : {&block.barrier, &warp.barrier, &grid.teams[block.team].barrier}) {
    if (barrier->arrived == 0) continue;
    fail(describe(thread) + ": leaves the kernel while " + std::to_string(barrier->arrived) +
         " threads wait for it at " + describe(barrier->site));
  }
  emulator::release(&grid);
  if (keeps_clocks()) grid.end.add(thread.clock);
  note_progress();
  ++warp.finished_lanes;
  if (++block.finished_threads == block.threads.size()) end_block(block);
}

// Of the thread that runs, for good.
void World::State::leave() {
  Thread& thread = *current;
  const Grid& grid = *thread.block->grid;
  take_from_ready(thread, Status::kFinished);
  ended_fiber = thread.fiber;
  ended_stream = &ranks[grid.launch.rank].streams[grid.launch.stream];
  ended_grid = grid.index;
  switch_to(failure != nullptr ? nullptr : next_ready());
  __builtin_unreachable();
}

void World::State::reuse_ended_fiber() {
  if (ended_fiber == nullptr) return;
  ended_stream->spent.emplace_back(ended_grid, std::exchange(ended_fiber, nullptr));
}

void World::State::end_block(Block& block) {
  Grid& grid = *block.grid;
  let_next_start(block);
  Rank& rank = ranks[grid.launch.rank];
  --rank.running_blocks;
  blocks_may_start = true;
  ++grid.finished;
  if (grid.is_complete()) complete_grids(rank.streams[grid.launch.stream]);
}

void World::State::let_next_start(Block& block) {
  if (block.lets_next_start) return;
  block.lets_next_start = true;
  ++block.grid->let_next_start;
  blocks_may_start = true;
}

void World::State::complete_grids(Stream& stream) {
  while (stream.completed < stream.grids.size() && stream.grids[stream.completed]->is_complete()) {
    stream.after_completed.learn(stream.grids[stream.completed]->end.sum());
    ++stream.completed;
  }
  // Not the one whose last thread runs now.
  const Grid* ending = current->block->grid;
  while (stream.cleared < stream.completed && stream.grids[stream.cleared].get() != ending) {
    stream.grids[stream.cleared++]->blocks.clear();
  }
  if (stream.completed == stream.grids.size()) return;
  for (const auto& block : stream.grids[stream.completed]->blocks) {
    for (Thread& thread : block->threads) {
      if (thread.status == Status::kDependency) make_ready(thread);
    }
  }
}

// ---- programmatic dependent launch ----

void World::State::acquire_earlier(const Grid& grid) const {
  const Stream& stream = stream_of(*this, grid);
  for (uint32_t i = 0; i < grid.index; ++i) acquire(stream.grids[i].get());
  for (const Grid* event : grid.events) {
    const Stream& other = stream_of(*this, *event);
    for (uint32_t i = 0; i <= event->index; ++i) acquire(other.grids[i].get());
  }
}

void wait_for_earlier_grids(Site site) {
  const Quiet quiet;
  World::State& world = *running;
  Thread& thread = *world.current;
  const Grid& grid = *thread.block->grid;
  const Stream& stream = stream_of(world, grid);
  thread.watched_count = 0;
  if (stream.completed < grid.index) {
    thread.site = site;
    world.wait(Status::kDependency);
  }
  world.acquire_earlier(grid);
  if (world.keeps_clocks()) thread.clock.others.learn(stream.after_completed);
}

void let_next_grid_start() {
  const Quiet quiet;
  running->let_next_start(*running->current->block);
}

}  // namespace gan::emulator
