// Launches, and the loop that runs them: see engine.h.
#include "engine.h"

#include <algorithm>
#include <cstring>

#include "sanitizers.h"
#include "world.h"

namespace gan::emulator {

World::State* running = nullptr;

World::State::State(uint32_t rank_count, Options given)
    : options(std::move(given)), random(options.seed), ranks(rank_count), memory_model(random) {
  for (const Stall& stall : options.stalls) ranks.at(stall.rank).stall = &stall;
  slow_rank = random.below(rank_count);
}

World::State::~State() {
  for_each_unfinished_thread([](Thread& thread) {
    if (thread.fiber != nullptr) FiberPool::give_back(thread.fiber, true);
  });
  for (Rank& rank : ranks) {
    for (Stream& stream : rank.streams) {
      for (const auto& spent : stream.spent) FiberPool::give_back(spent.second, false);
    }
  }
}

World::World(uint32_t ranks, Options options) {
  const Quiet quiet;
  constexpr uint32_t kMostRanks = 32;  // bits of Users::ranks
  if (ranks == 0 || ranks > kMostRanks) throw std::invalid_argument("ranks: 1 to 32 are required");
  state_ = std::make_unique<State>(ranks, std::move(options));
}
World::~World() {
  const Quiet quiet;
  state_.reset();
}

static Stream& stream_of(World::State& state, uint32_t rank, uint32_t stream) {
  std::deque<Stream>& streams = state.ranks.at(rank).streams;
  if (streams.size() <= stream) streams.resize(stream + 1);
  return streams[stream];
}

void World::launch(const Launch& launch, std::function<void()> kernel) {
  const Quiet quiet;
  if (launch.blocks == 0 || launch.threads == 0 || launch.cluster_blocks == 0 ||
      launch.blocks % launch.cluster_blocks != 0) {
    throw std::invalid_argument("launch: blocks, threads and whole clusters are required");
  }
  State& state = *state_;
  Stream& stream = stream_of(state, launch.rank, launch.stream);
  auto grid = std::make_unique<Grid>();
  grid->launch = launch;
  grid->kernel = std::move(kernel);
  grid->index = static_cast<uint32_t>(stream.grids.size());
  grid->first_thread = state.threads;
  state.threads += launch.blocks * launch.threads;
  grid->events.swap(stream.events);
  const uint32_t teams = launch.blocks / launch.cluster_blocks;
  for (uint32_t i = 0; i < teams; ++i) grid->block_order.push_back(i);
  if (state.options.any_block_order) {
    for (uint32_t i = teams; i > 1; --i) {
      std::swap(grid->block_order[i - 1], grid->block_order[state.random.below(i)]);
    }
  }
  grid->teams.resize(teams);
  stream.grids.push_back(std::move(grid));
  state.blocks_may_start = true;
}

void World::wait_for_stream(uint32_t rank, uint32_t stream, uint32_t earlier) {
  const Quiet quiet;
  const Stream& other = stream_of(*state_, rank, earlier);
  if (!other.grids.empty()) {
    Grid* last = other.grids.back().get();
    stream_of(*state_, rank, stream).events.push_back(last);
  }
}

void World::run() { run(false); }
void World::run_except_stalled() { run(true); }

void World::run(bool leaves_stalled) {
  const Quiet quiet;
  release(state_.get());
  running = state_.get();
  state_->run(leaves_stalled);
  for (Rank& rank : state_->ranks) {
    for (Stream& stream : rank.streams) {
      for (const auto& grid : stream.grids) acquire(grid.get());
    }
  }
  state_->for_each_unfinished_thread([](const Thread& thread) {
    if (thread.fiber != nullptr) thread.fiber->order_before_caller();
  });
}

uint64_t World::switches() const { return state_->switches; }
uint64_t World::now_ns() const { return state_->now_ns; }

bool World::State::is_complete(bool leaves_stalled) const {
  for (const Rank& rank : ranks) {
    if (rank.stands_still && (leaves_stalled || rank.stall->until_ns == Stall::kForEver)) continue;
    for (const Stream& stream : rank.streams) {
      if (stream.completed != stream.grids.size()) return false;
    }
  }
  return true;
}

void World::State::run(bool leaves_stalled) {
  note_progress();
  while (!is_complete(leaves_stalled)) {
    Thread* next = next_ready();
    if (next == nullptr) next = directed();
    if (next != nullptr) {
      switch_to(next);
    } else if (!go_on_idle()) {
      fail(hang_report());
    }
    if (failure != nullptr) std::rethrow_exception(std::exchange(failure, nullptr));
  }
  // What the host does next is ordered after all this.
  for (Granule& granule : granules) std::fill_n(granule.users, kWordsAGranule, Users{});
  races.forget_all();
  memory_model.forget_all();
}

void World::State::fail_here(const std::string& what, Site site) const {
  fail(describe(*current) + " at " + describe(site) + ": " + what);
}

}  // namespace gan::emulator
