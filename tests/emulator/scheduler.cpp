// Who runs next, what time it is, and when nothing can go on.
#include <algorithm>

#include "sanitizers.h"
#include "world.h"

namespace gan::emulator {

void World::State::make_ready(Thread& thread) {
  thread.status = Status::kReady;
  Rank& rank = ranks[thread.rank()];
  if (rank.stands_still) {
    rank.held.push_back(&thread);
    return;
  }
  thread.place = static_cast<uint32_t>(ready.size());
  ready.push_back(&thread);
}

void World::State::take_from_ready(Thread& thread, Status status) {
  Thread* last = ready.back();
  ready[thread.place] = last;
  last->place = thread.place;
  ready.pop_back();
  thread.status = status;
}

void World::State::wait(Status status) {
  take_from_ready(*current, status);
  switch_away();
}

// ---- turns ----

void World::State::give_way() {
  bool gives_way = false;
  switch (options.schedule) {
    case Schedule::kUniform:
      gives_way = random.one_in(2);
      break;
    case Schedule::kOneSlowRank:
      gives_way = random.one_in(4);
      break;
    case Schedule::kBursts:
      gives_way = random.one_in(64);
      break;
    case Schedule::kRoundRobin:
      break;
  }
  if (gives_way) switch_away();
}

Thread* World::State::next_ready() {
  if (blocks_may_start) start_blocks();
  constexpr uint32_t kTurnsADelivery = 16;
  while (!counted_stores.empty() && (ready.empty() || random.one_in(kTurnsADelivery))) {
    if (!deliver_one()) break;
  }
  return ready.empty() ? nullptr : pick_ready();
}

Thread* World::State::pick_ready() {
  const auto count = static_cast<uint32_t>(ready.size());
  switch (options.schedule) {
    case Schedule::kOneSlowRank: {
      constexpr uint32_t kTurnsOfOne = 256, kTries = 8;
      if (random.one_in(kTurnsOfOne)) {
        slow_rank = random.below(static_cast<uint32_t>(ranks.size()));
      }
      for (uint32_t i = 0; i < kTries; ++i) {
        Thread* thread = ready[random.below(count)];
        if (thread->rank() != slow_rank) return thread;
      }
      break;
    }
    case Schedule::kBursts:
      if (!random.one_in(64)) return ready.back();
      break;
    case Schedule::kRoundRobin:
      return ready[turn++ % count];
    case Schedule::kUniform:
      break;
  }
  return ready[random.below(count)];
}

void World::State::switch_to(Thread* next) {
  Thread* from = current;
  if (next == from) return;
  if (next != nullptr && next->fiber == nullptr) give_fiber(*next);
  current = next;
  if (next != nullptr) {
    const Block& block = *next->block;
    threadIdx.x = next->index;
    blockIdx.x = block.index;
    blockDim.x = block.grid->launch.threads;
    gridDim.x = block.grid->launch.blocks;
    ++switches;
  }
  Fiber& from_fiber = from != nullptr ? *from->fiber : Fiber::main();
  Fiber& to_fiber = next != nullptr ? *next->fiber : Fiber::main();
  Fiber::switch_between(from_fiber, to_fiber, ended_fiber == &from_fiber);
  reuse_ended_fiber();
}

Thread* World::State::directed() {
  if (choices.empty()) return nullptr;
  std::sort(choices.begin(), choices.end(),
            [](const Thread* a, const Thread* b) { return a->number < b->number; });
  pending.clear();
  for (const Thread* thread : choices) pending.push_back(thread->pending);
  const size_t chosen = options.director->choose(pending);
  Thread* thread = choices[chosen];
  choices.erase(choices.begin() + static_cast<std::ptrdiff_t>(chosen));
  make_ready(*thread);
  return thread;
}

// ---- time ----

// One look more of everybody who polls: what looked like a loop may be none, and with the clock on,
// deadlines end.
bool World::State::go_on_idle() {
  constexpr uint32_t kMostRoundsInNoTime = 512;
  constexpr uint64_t kShortestStep = 1'000'000, kStepsOfIdleTime = 256;
  constexpr uint64_t kLongestIdleTime = 1'000'000'000'000'000;

  std::vector<Thread*> polling;
  for_each_unfinished_thread([&](Thread& thread) {
    if (thread.status == Status::kPolling) polling.push_back(&thread);
  });
  const uint64_t idle_ns = now_ns - idle_since_ns;
  const uint64_t stall_end = next_stall_end();
  const bool looks_again =
      !polling.empty() &&
      (options.time_passes ? idle_ns < kLongestIdleTime : idle_rounds < kMostRoundsInNoTime);
  if (!looks_again && stall_end == Stall::kForEver) return false;
  ++idle_rounds;
  if (looks_again) {
    for (Thread* thread : polling) {
      wake(*thread);
      thread->watched_count = 0;
    }
    if (!options.time_passes) return true;
  }
  // Longer steps the longer it takes: deadlines may be anything from milliseconds to hours. But 64
  // of them, from a look at the clock to the next (exchange.cuh), are shorter than the time by
  // which one deadline is set behind another.
  const uint64_t step = std::max(kShortestStep, idle_ns / kStepsOfIdleTime);
  move_clock(looks_again ? std::min(now_ns + step, stall_end) : stall_end);
  return true;
}

void World::State::move_clock(uint64_t to_ns) {
  now_ns = to_ns;
  for (Rank& rank : ranks) {
    if (!rank.stands_still || now_ns < rank.stall->until_ns) continue;
    rank.stands_still = false;
    rank.stall = nullptr;
    blocks_may_start = true;
    note_progress();
    for (Thread* thread : rank.held) make_ready(*thread);
    rank.held.clear();
  }
}

uint64_t World::State::next_stall_end() const {
  uint64_t first = Stall::kForEver;
  for (const Rank& rank : ranks) {
    if (rank.stands_still) first = std::min(first, rank.stall->until_ns);
  }
  return first;
}

void World::State::count_access(Thread& thread) {
  Rank& rank = ranks[thread.rank()];
  ++rank.accesses;
  if (rank.stall == nullptr || rank.stands_still || rank.accesses <= rank.stall->after_accesses ||
      rank.stall->until_ns <= now_ns) {
    return;
  }
  rank.stands_still = true;
  for (Thread* other : std::vector<Thread*>(ready)) {
    if (&ranks[other->rank()] != &rank) continue;
    take_from_ready(*other, Status::kReady);
    rank.held.push_back(other);
  }
  switch_away();
}

uint64_t read_clock() {
  const Quiet quiet;
  World::State& world = *running;
  const uint32_t one_in = world.options.one_look_late;
  if (world.options.time_passes && one_in != 0 && world.random.one_in(one_in)) {
    constexpr uint64_t kDay = 86'400'000'000'000;
    world.move_clock(world.now_ns + kDay);
    world.idle_since_ns += kDay;  // nobody has waited for so long
  }
  return world.now_ns;
}

}  // namespace gan::emulator
