// CUDA's way of running kernels, on the CPU, for tests. Every CUDA thread of every rank is a fiber;
// one OS thread runs them all under a seeded scheduler, so that a seed repeats a run exactly.
//
// A World has ranks (GPUs), each with streams of launches. The kernels it runs are the product's
// own files, compiled with GAN_EMULATOR; emulator.h has what gpu.cuh promises them, made of the
// functions at the end of this file.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "vectors.h"

// Of the thread that runs now.
inline uint3 threadIdx, blockIdx, blockDim, gridDim;

namespace gan::emulator {

struct VectorClock;

// How fibers take turns.
enum class Schedule {
  kUniform,      // any fiber that can run, at every access
  kOneSlowRank,  // one rank hardly runs, another one from time to time
  kBursts,       // a fiber runs on for long
  kRoundRobin,   // in turn, without preemption
};

// A rank whose threads stand still from its so many-th access of memory on, as in a process that
// was stopped, until the clock says so.
struct Stall {
  static constexpr uint64_t kForEver = UINT64_MAX;
  uint32_t rank = 0;
  uint64_t after_accesses = 0;
  uint64_t until_ns = kForEver;
};

// An access that a thread is about to make, for a Director.
struct PendingAccess {
  uint32_t thread;  // of the world: numbered in the order of launches, blocks and threads
  bool writes;
  uintptr_t address;
  uint32_t bytes;
  const VectorClock* clock;  // the thread's; of what barriers and kernel boundaries order
};

// Decides the order of accesses where the seed does not: the explorer.
class Director {
 public:
  virtual ~Director() = default;
  // The accesses of these words are put in order by `choose`. Bit i: word i of a granule, which is
  // 16 bytes, by its address / 16.
  virtual uint32_t contended_words(uintptr_t granule) = 0;
  // These are accessed without order, and one access writes.
  virtual void found_contended(uintptr_t granule, uint32_t words) = 0;
  // Which of the accesses, in the order of their threads, is made next. Throws Pruned.
  virtual size_t choose(const std::vector<PendingAccess>& pending) = 0;
};

struct Options {
  uint64_t seed = 1;
  Schedule schedule = Schedule::kUniform;
  bool tear = false;    // relaxed accesses of 16 bytes are four, in any order, with others between
  bool weak = false;    // relaxed loads may give old values, as far as the memory model lets
                        // them, and accesses that nothing orders are races
  bool strict = false;  // with weak: so are two relaxed stores to one place that nothing orders
  uint32_t resident_blocks = 0;  // that a rank can run at once (clusters whole); 0: all
  bool any_block_order = false;  // blocks start in any order, not by their index

  // The clock stands still, and a state in which all wait for each other for ever is a Failure;
  // unless
  bool time_passes = false;    // then the clock goes on where all wait, and
  uint32_t one_look_late = 0;  // ... one look at the clock of so many finds every deadline over
  // ... all threads of this rank poll on without sleep, so that they look at the clock while others
  // run and data arrives
  uint32_t eager_rank = UINT32_MAX;
  std::vector<Stall> stalls;

  Director* director = nullptr;  // accesses of 16 bytes are whole then
};

// Hang, race, diverging barrier, access to memory that is nobody's: in words, with rank, block,
// thread and line.
struct Failure : std::runtime_error {
  using runtime_error::runtime_error;
};
struct Pruned : std::exception {};

struct Launch {
  uint32_t rank = 0;
  uint32_t stream = 0;  // of the rank; each runs in its order
  uint32_t blocks = 1, threads = 32;
  uint32_t cluster_blocks = 1;  // divides blocks
  uint32_t dynamic_shared_bytes = 0;
  bool starts_early = false;  // programmatic dependent launch
};

class World {
 public:
  World(uint32_t ranks, Options options);
  ~World();
  World(const World&) = delete;
  World& operator=(const World&) = delete;

  // Queues a launch. The kernel is called once for each of its threads.
  void launch(const Launch& launch, std::function<void()> kernel);
  // The rank's next launch in `stream` starts after all that its stream `earlier` has now: an
  // event.
  void wait_for_stream(uint32_t rank, uint32_t stream, uint32_t earlier);
  // Until all launches have completed, those of ranks that stand still for ever apart. Throws
  // Failure. More may be launched and run afterwards.
  void run();
  // The same, but does not wait for ranks that stand still by now either: what they left undone is
  // done in the next run.
  void run_except_stalled();

  uint64_t switches() const;  // between fibers, so far
  uint64_t now_ns() const;    // the clock

  struct State;

 private:
  void run(bool leaves_stalled);

  std::unique_ptr<State> state_;
};

// ---- what emulator.h is made of: called by the thread that runs now ----

// Where in the kernels something is called; the address of a default argument's caller.
struct Site {
  const char* file;
  int line;
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};

enum class Access : uint8_t { kLoad, kStore, kRelaxedLoad, kRelaxedStore, kReadModifyWrite };
// Of a relaxed access or a fence: it counts among the threads of one rank, or of all. Ordinary
// accesses have none, and say kSystem.
enum class Scope : uint8_t { kGpu, kSystem };

// How an access is to be made.
struct Handling {
  bool torn;      // word after word as next_word says
  bool modelled;  // by the modelled_ functions
};
// Before each access. Others may run first.
Handling begin_access(Access access, Scope scope, const void* address, uint32_t words,
                      uint32_t word_bytes, Site site);
// Which word of a torn access is next, after `done` of them. Others may run first.
uint32_t next_word(uint32_t done);
// A word of 4 or 8 bytes, by the memory model.
uint64_t modelled_load(const void* word, uint32_t bytes);
void modelled_store(void* word, uint32_t bytes, uint64_t value);
bool modelled_claim(uint32_t* word);
uint32_t modelled_add(uint32_t* word, uint32_t value);

void fence(Scope scope);
uint64_t read_clock();

void block_barrier(Site site);
void warp_barrier(Site site);
uint32_t exchange_in_warp(uint32_t bits, uint32_t lane_mask, Site site);

// Memory of the block: `slot` 0 is the dynamic one, new_shared_slot() gives the others.
void* shared_memory(uint32_t slot, size_t bytes);
uint32_t new_shared_slot();

struct ClusterPlace {
  uint32_t index, count, block, blocks;
};
ClusterPlace place_in_cluster();
void cluster_barrier(Site site);
void init_counter(uint64_t* own, Site site);
void send_counted(uint32_t block, uint32_t* own, uint32_t bits, uint64_t* own_counter, Site site);
void expect_counted(uint64_t* own, uint32_t bytes, Site site);
void wait_for_counted(uint64_t* own, uint32_t parity, Site site);

void wait_for_earlier_grids(Site site);
void let_next_grid_start();

}  // namespace gan::emulator
