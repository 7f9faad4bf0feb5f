// A World from within: its ranks, streams, grids, blocks and threads, and who waits for what.
//
// engine.cpp has launches and run(), scheduler.cpp turns, the clock and hangs, grids.cpp blocks
// from their start to their end, barriers.cpp and clusters.cpp what threads wait for, accesses.cpp
// memory.
#pragma once
#include <deque>
#include <exception>
#include <memory>
#include <string>
#include <vector>

#include "engine.h"
#include "fibers.h"
#include "memory_map.h"
#include "memory_model.h"
#include "random.h"
#include "vector_clock.h"

namespace gan::emulator {

constexpr uint32_t kLanes = 32;  // of a warp

struct Block;
struct Grid;
struct Thread;

enum class Status : uint8_t {
  kReady,
  kPolling,  // asleep until what it polls is written
  kChoice,   // about to make an access, for the Director
  kBlockSync,
  kWarpSync,
  kShuffle,
  kClusterStart,
  kByteCounter,
  kDependency,  // in grid_dependency_wait
  kFinished,
};

// Words of a granule, bit i for word i.
struct WordSet {
  uint32_t granule, mask;
};

// What a thread has read since it last did anything else, in the list of those who sleep until
// something of the granule is written.
struct Watched {
  WordSet words;
  uint32_t version;
  bool has_news;  // since then it was written, or an old value was read
  Thread* thread;
  Watched *next, *previous;
};

struct Thread {
  static constexpr uint32_t kMostWatched = 16;

  Block* block = nullptr;
  uint32_t index = 0;   // in the block
  uint32_t number = 0;  // in the world
  Fiber* fiber = nullptr;
  Status status = Status::kFinished;
  uint32_t place = 0;  // among those that are ready
  Site site = {"", 0};
  const uint64_t* waits_for = nullptr;  // a byte counter
  PendingAccess pending = {};

  uint32_t watched_count = 0;
  uint32_t eager_polls = 0;  // how often it polls without sleeping
  Watched watched[kMostWatched];
  Watched* last_watched = nullptr;

  // Of the torn access that it makes:
  WordSet torn = {0, 0};
  bool tears_store = false;
  uint8_t word_order[4] = {};

  VectorClock clock;
  ByScope acquired;  // with what it read, for its next fence
  ByScope released;  // by its last fences, with its relaxed stores since
  Knowledge fenced;  // by this thread's fences and those of threads it synchronised with since

  uint32_t rank() const;
};

struct Barrier {
  uint32_t arrived = 0;
  Site site = {"", 0};
  Gathering gathering;
  Knowledge fenced;
  Knowledge passed, passed_fenced;  // by those who went through last
};

struct Warp {
  uint32_t bits[2][kLanes];
  uint32_t exchanges = 0;
  uint32_t finished_lanes = 0;
  Barrier barrier;
};

// Blocks that start together.
struct Team {
  uint32_t first_block = 0;  // in Grid::blocks
  Barrier barrier;
};

// An mbarrier of one arrival.
struct Counter {
  uint64_t* address;
  uint32_t pending_arrivals = 1;
  int64_t missing_bytes = 0;
  uint32_t phase = 0;
  Knowledge knowledge;
};

struct SharedMemory {
  uint32_t slot;
  size_t bytes;
  std::unique_ptr<char[]> memory;
};

struct Block {
  Grid* grid = nullptr;
  uint32_t index = 0, team = 0;
  uint32_t finished_threads = 0;
  uint32_t stores_under_way = 0;  // to it
  bool lets_next_start = false;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  Barrier barrier;
  std::vector<SharedMemory> shared;
  std::vector<Counter> counters;
};

struct Grid {
  Launch launch;
  std::function<void()> kernel;
  uint32_t index = 0;         // in its stream
  uint32_t first_thread = 0;  // number in the world
  std::vector<Grid*> events;  // that must have completed before
  std::vector<uint32_t> block_order;
  uint32_t started = 0;  // blocks
  uint32_t let_next_start = 0;
  uint32_t finished = 0;
  std::vector<std::unique_ptr<Block>> blocks;  // in the order of their start
  std::vector<Team> teams;
  Knowledge at_start;  // what its threads know when they start
  Gathering end;       // what they did

  // Programmatic dependent launch needs the two launches next to each other.
  bool overlaps_previous() const { return launch.starts_early && events.empty(); }
  bool all_started() const { return started == launch.blocks; }
  bool is_complete() const { return finished == launch.blocks; }
};

struct Stream {
  std::vector<std::unique_ptr<Grid>> grids;
  uint32_t completed = 0;                         // the first so many grids
  uint32_t cleared = 0;                           // of these, without their blocks
  Knowledge after_completed;                      // what they did
  std::vector<Grid*> events;                      // for the next launch
  std::deque<std::pair<uint32_t, Fiber*>> spent;  // fibers, with the index of the grid they were of
};

struct Rank {
  std::deque<Stream> streams;
  uint32_t running_blocks = 0;
  uint64_t accesses = 0;
  const Stall* stall = nullptr;  // still to come, or going on
  bool stands_still = false;
  std::vector<Thread*> held;  // that would be ready
};

inline uint32_t Thread::rank() const { return block->grid->launch.rank; }

// A store of store_counted.
struct CountedStore {
  Block* block;
  uint32_t* to;
  uint32_t bits;
  uint64_t* counter;
  Knowledge knowledge;
};

// Who has accessed a word in this run.
struct Users {
  uint32_t ranks = 0;  // bit r: rank r
  bool gpu_scope = false;
};

struct Granule {
  uint32_t versions[kWordsAGranule] = {};
  Users users[kWordsAGranule] = {};
  uint32_t contended_words = 0;
  Watched* sleepers = nullptr;
};

struct World::State {
  State(uint32_t ranks, Options options);
  ~State();

  // ---- engine.cpp ----
  bool is_complete(bool leaves_stalled) const;
  void run(bool leaves_stalled);
  [[noreturn]] void fail(const std::string& what) const { throw Failure(what); }
  [[noreturn]] void fail_here(const std::string& what, Site site) const;

  // ---- scheduler.cpp ----
  void make_ready(Thread& thread);
  void take_from_ready(Thread& thread, Status status);
  // The thread that runs waits, until made ready.
  void wait(Status status);
  // Another may run before the one that runs goes on.
  void give_way();
  // Lets go of the fiber that runs. Where nothing is ready, main decides.
  void switch_to(Thread* next);
  void switch_away() { switch_to(next_ready()); }
  Thread* next_ready();
  Thread* pick_ready();
  Thread* directed();
  // Nothing is ready. False: nothing ever will be.
  bool go_on_idle();
  void move_clock(uint64_t now_ns);
  uint64_t next_stall_end() const;
  void stand_still(Rank& rank);
  void count_access(Thread& thread);
  void note_progress() {
    idle_rounds = 0;
    vain_polls = 0;
    idle_since_ns = now_ns;
  }

  // ---- grids.cpp ----
  void start_blocks();
  bool may_start(const Stream& stream, const Grid& grid) const;
  void set_out(const Stream& stream, Grid& grid);
  void start_team(Rank& rank, Grid& grid);
  void give_fiber(Thread& thread);
  void end_thread();
  [[noreturn]] void leave();
  void reuse_ended_fiber();
  void end_block(Block& block);
  void let_next_start(Block& block);
  void complete_grids(Stream& stream);
  void acquire_earlier(const Grid& grid) const;
  template <typename Visit>
  void for_each_unfinished_thread(const Visit& visit) const;

  // ---- barriers.cpp ----
  bool arrive(Barrier& barrier, uint32_t all, uint32_t finished, Site site);
  void let_go_on(Block& block, uint32_t first, uint32_t count, Status status);

  // ---- clusters.cpp ----
  Counter& counter_of(Block& block, const uint64_t* address, Site site);
  void* shared_memory_of(Block& block, uint32_t slot, size_t bytes);
  void* counterpart(Block& block, const void* own, Site site);
  void end_phase_if_done(Block& block, Counter& counter);
  bool deliver_one();

  // ---- accesses.cpp ----
  Handling begin_access(Access access, Scope scope, const void* address, uint32_t words,
                        uint32_t word_bytes, Site site);
  WordSet words_at(const void* address, uint32_t bytes);
  uint32_t version_of(WordSet words) const;
  bool poll_again(Thread& thread, Watched& watched);
  bool take_news(Thread& thread);
  void sleep_until_written(Thread& thread);
  bool polls_eagerly(Thread& thread);
  void wake(Thread& thread);
  void watch(Thread& thread, WordSet words);
  void note_store(WordSet words);
  void check_scope(Scope scope, WordSet words, Site site);
  void detect_races(Access access, const void* address, WordSet words, Site site);

  // ---- report.cpp ----
  std::string hang_report() const;
  std::string describe_thread(uint32_t number) const;

  const Options options;
  Random random;
  std::vector<Rank> ranks;
  std::vector<Thread*> ready;
  std::vector<Thread*> choices;        // those whose status is kChoice
  std::vector<PendingAccess> pending;  // theirs
  std::vector<CountedStore> counted_stores;
  MemoryMap memory_map;
  std::vector<Granule> granules;  // by memory_map's numbers
  RaceDetector races;
  MemoryModel memory_model;

  Thread* current = nullptr;     // null: main
  Fiber* ended_fiber = nullptr;  // to be reused once nothing runs on it
  Stream* ended_stream = nullptr;
  uint32_t ended_grid = 0;
  std::exception_ptr failure;
  bool blocks_may_start = false;

  // What Schedule keeps between turns.
  uint32_t slow_rank = 0;
  uint32_t turn = 0;

  uint64_t now_ns = 0;
  uint64_t switches = 0;
  uint64_t idle_since_ns = 0;
  uint32_t idle_rounds = 0;  // since there was progress
  uint64_t vain_polls = 0;
  uint32_t threads = 0;  // launched

  // Whether vector clocks are kept.
  bool keeps_clocks() const { return options.weak || options.director != nullptr; }
};

// The one that runs now.
extern World::State* running;

std::string describe(const Site& site);
std::string describe(const Thread& thread);  // rank, block, thread

template <typename Visit>
void World::State::for_each_unfinished_thread(const Visit& visit) const {
  for (const Rank& rank : ranks) {
    for (const Stream& stream : rank.streams) {
      for (size_t i = stream.completed; i < stream.grids.size(); ++i) {
        for (const auto& block : stream.grids[i]->blocks) {
          for (Thread& thread : block->threads) {
            if (thread.status != Status::kFinished) visit(thread);
          }
        }
      }
    }
  }
}

}  // namespace gan::emulator
