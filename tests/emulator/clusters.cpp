// Clusters: shared memory, and stores to that of other blocks, which arrive some time later and are
// counted there.
#include <cstring>

#include "sanitizers.h"
#include "world.h"

namespace gan::emulator {

// ---- shared memory ----

// Not initialised: NaN, an empty inbox word, and no sensible counter.
static constexpr int kPoison = 0xff;

void* shared_memory(uint32_t slot, size_t bytes) {
  const Quiet quiet;
  World::State& world = *running;
  return world.shared_memory_of(*world.current->block, slot, bytes);
}

void* World::State::shared_memory_of(Block& block, uint32_t slot, size_t bytes) {
  for (const SharedMemory& shared : block.shared) {
    if (shared.slot == slot) return shared.memory.get();
  }
  if (slot == 0) bytes = block.grid->launch.dynamic_shared_bytes;
  SharedMemory shared{slot, bytes, std::unique_ptr<char[]>(new char[bytes])};
  std::memset(shared.memory.get(), kPoison, bytes);
  block.shared.push_back(std::move(shared));
  return block.shared.back().memory.get();
}

uint32_t new_shared_slot() {
  static uint32_t slots = 0;
  return ++slots;
}

// Where `own`, in the shared memory of the block that runs, lies in another's.
void* World::State::counterpart(Block& block, const void* own, Site site) {
  for (const SharedMemory& shared : current->block->shared) {
    const char* start = shared.memory.get();
    const auto* byte = static_cast<const char*>(own);
    if (byte < start || byte >= start + shared.bytes) continue;
    return static_cast<char*>(shared_memory_of(block, shared.slot, shared.bytes)) + (byte - start);
  }
  fail_here("an address that is not in the block's shared memory", site);
}

// ---- byte counters ----

ClusterPlace place_in_cluster() {
  const Quiet quiet;
  const Block& block = *running->current->block;
  const Launch& launch = block.grid->launch;
  return {block.team, launch.blocks / launch.cluster_blocks, block.index % launch.cluster_blocks,
          launch.cluster_blocks};
}

Counter& World::State::counter_of(Block& block, const uint64_t* address, Site site) {
  for (Counter& counter : block.counters) {
    if (counter.address == address) return counter;
  }
  fail_here("a byte counter that has not been initialised", site);
}

void init_counter(uint64_t* own, Site site) {
  const Quiet quiet;
  World::State& world = *running;
  Block& block = *world.current->block;
  for (const Counter& counter : block.counters) {
    if (counter.address == own) world.fail_here("a byte counter is initialised twice", site);
  }
  block.counters.push_back({own, 1, 0, 0, {}});
}

void send_counted(uint32_t block, uint32_t* own, uint32_t bits, uint64_t* own_counter, Site site) {
  const Quiet quiet;
  World::State& world = *running;
  Thread& thread = *world.current;
  Grid& grid = *thread.block->grid;
  thread.watched_count = 0;
  if (block >= grid.launch.cluster_blocks) world.fail_here("no such block in the cluster", site);
  Block& other = *grid.blocks[grid.teams[thread.block->team].first_block + block];
  if (other.finished_threads != 0) {
    world.fail_here("a store to a block whose threads have left the kernel", site);
  }
  auto* to = static_cast<uint32_t*>(world.counterpart(other, own, site));
  auto* counter = static_cast<uint64_t*>(world.counterpart(other, own_counter, site));
  world.counter_of(other, counter, site);
  write_word(to);
  release(counter);
  CountedStore store{&other, to, bits, counter, {}};
  if (world.options.director != nullptr) {
    store.knowledge = thread.clock.others;
    store.knowledge.learn(thread.number, thread.clock.epoch++);
  } else if (world.options.weak) {
    // The store is asynchronous: it comes after earlier accesses of memory only where one of the
    // threads that are before it has fenced.
    store.knowledge = thread.fenced;
  }
  ++other.stores_under_way;
  world.counted_stores.push_back(std::move(store));
  world.note_progress();
  world.give_way();
}

bool World::State::deliver_one() {
  const auto count = static_cast<uint32_t>(counted_stores.size());
  const uint32_t first = random.below(count);
  for (uint32_t i = 0; i < count; ++i) {
    const uint32_t index = (first + i) % count;
    if (ranks[counted_stores[index].block->grid->launch.rank].stands_still) continue;
    std::swap(counted_stores[index], counted_stores.back());
    const CountedStore store = std::move(counted_stores.back());
    counted_stores.pop_back();
    --store.block->stores_under_way;
    *store.to = store.bits;
    for (Counter& counter : store.block->counters) {
      if (counter.address != store.counter) continue;
      counter.missing_bytes -= sizeof(*store.to);
      counter.knowledge.learn(store.knowledge);
      end_phase_if_done(*store.block, counter);
    }
    return true;
  }
  return false;
}

void World::State::end_phase_if_done(Block& block, Counter& counter) {
  if (counter.pending_arrivals != 0 || counter.missing_bytes != 0) return;
  counter.pending_arrivals = 1;
  ++counter.phase;
  note_progress();
  for (Thread& thread : block.threads) {
    if (thread.status == Status::kByteCounter && thread.waits_for == counter.address) {
      make_ready(thread);
    }
  }
}

void expect_counted(uint64_t* own, uint32_t bytes, Site site) {
  const Quiet quiet;
  World::State& world = *running;
  Thread& thread = *world.current;
  Counter& counter = world.counter_of(*thread.block, own, site);
  thread.watched_count = 0;
  if (counter.pending_arrivals == 0) {
    world.fail_here("expect_bytes twice in one phase of a byte counter", site);
  }
  release(own);
  if (world.keeps_clocks()) {
    counter.knowledge.learn(thread.clock.others);
    counter.knowledge.learn(thread.number, thread.clock.epoch++);
  }
  counter.missing_bytes += bytes;
  --counter.pending_arrivals;
  world.end_phase_if_done(*thread.block, counter);
}

void wait_for_counted(uint64_t* own, uint32_t parity, Site site) {
  const Quiet quiet;
  World::State& world = *running;
  Thread& thread = *world.current;
  Counter& counter = world.counter_of(*thread.block, own, site);
  thread.watched_count = 0;
  thread.site = site;
  thread.waits_for = own;
  while (counter.phase % 2 == parity) world.wait(Status::kByteCounter);
  acquire(own);
  if (!world.keeps_clocks()) return;
  thread.clock.others.learn(counter.knowledge);
  thread.fenced.learn(counter.knowledge);
}

}  // namespace gan::emulator
