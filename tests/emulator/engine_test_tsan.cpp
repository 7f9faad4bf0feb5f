// That ThreadSanitizer finds races in kernels, and none where the engine puts accesses in order: a
// program of its own, with this file built with -fsanitize=thread and the engine without (both with
// GAN_EMULATOR_TSAN). Each case runs in a process of its own, whose exit status tells.
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>

#include "emulator.h"

using namespace gan;
using namespace gan::emulator;

namespace {

struct Shared {
  float value;
  ByteCounter counter;
  uint32_t words[64];
};

uint4 pack;
volatile uint32_t used;  // so that no load is left out

Launch shape(uint32_t rank) {
  Launch launch;
  launch.rank = rank;
  launch.threads = 64;
  return launch;
}

void store_by(uint32_t thread) {
  if (threadIdx.x == thread) store(&pack, {1, 1, 1, 1});
}
void load_by(uint32_t thread) {
  if (threadIdx.x == thread) used = load(&pack).x;
}

void block(World& world, bool orders) {
  world.launch(shape(0), [orders] {
    auto& shared = block_shared<Shared>();
    shared.words[threadIdx.x] = threadIdx.x;
    if (orders) block_sync();
    volatile uint32_t word = shared.words[63 - threadIdx.x];
    (void)word;
  });
}

void warp(World& world, bool orders) {
  world.launch(shape(0), [orders] {
    store_by(3);
    shuffle_xor(1.0f, 1);
    if (orders) warp_sync();
    load_by(2);
  });
}

void early_start(World& world, bool orders) {
  world.launch(shape(0), [] {
    grid_launch_dependents();
    store_by(0);
  });
  Launch second = shape(0);
  second.starts_early = true;
  world.launch(second, [orders] {
    if (orders) grid_dependency_wait();
    load_by(1);
  });
}

void streams(World& world, bool orders) {
  world.launch(shape(0), [] { store_by(3); });
  if (orders) world.wait_for_stream(0, 1, 0);
  Launch second = shape(0);
  second.stream = 1;
  world.launch(second, [] { load_by(40); });
}

void cluster(World& world, bool orders) {
  Launch launch = shape(0);
  launch.blocks = launch.cluster_blocks = 2;
  world.launch(launch, [orders] {
    auto& shared = block_shared<Shared>();
    if (threadIdx.x == 0) init_byte_counter(&shared.counter);
    cluster_start();
    if (threadIdx.x == 0) {
      store_counted(1 - blockIdx.x, &shared.value, 1.0f, &shared.counter);
      expect_bytes(&shared.counter, sizeof(float));
    }
    if (orders) wait_for_bytes(&shared.counter, 0);
    volatile float value = shared.value;
    (void)value;
    wait_for_bytes(&shared.counter, 0);
  });
}

// Relaxed accesses do not race with each other, but with ordinary ones.
void ranks(World& world, bool relaxed) {
  world.launch(shape(0), [relaxed] {
    if (threadIdx.x != 0) return;
    relaxed ? store_relaxed_sys(&pack, {1, 1, 1, 1}) : store(&pack, {1, 1, 1, 1});
  });
  world.launch(shape(1), [] {
    if (threadIdx.x == 0) used = load_relaxed_sys(&pack).x;
  });
}

bool has_race(void (*launch)(World&, bool), bool orders, uint64_t seed) {
  constexpr int kRaceStatus = 66;
  std::fflush(stdout);
  const pid_t child = fork();
  if (child == 0) {
    (void)!std::freopen("/dev/null", "w", stderr);
    Options options;
    options.seed = seed;
    {
      World world(2, options);
      launch(world, orders);
      world.run();
      used = pack.x;
    }
    std::exit(0);
  }
  int status = 0;
  waitpid(child, &status, 0);
  return WIFEXITED(status) && WEXITSTATUS(status) == kRaceStatus;
}

}  // namespace

int main() {
  const struct {
    const char* name;
    void (*launch)(World&, bool);
  } kCases[] = {{"shared memory, block_sync", block},
                {"a warp, warp_sync", warp},
                {"an early start, grid_dependency_wait", early_start},
                {"two streams, an event", streams},
                {"store_counted, wait_for_bytes", cluster},
                {"two ranks, relaxed accesses", ranks}};
  int failed = 0, passed = 0;
  for (const auto& it : kCases) {
    bool is_right = true;
    for (uint64_t seed = 1; seed <= 3; ++seed) {
      is_right &= has_race(it.launch, false, seed) && !has_race(it.launch, true, seed);
    }
    std::printf("%s  %s\n", is_right ? "ok    " : "FAILED", it.name);
    ++(is_right ? passed : failed);
  }
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed != 0;
}
