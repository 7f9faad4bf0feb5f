// Tests of the engine itself: that it runs what it should, and finds what it should find.
#include "engine_test.h"

#include <cstdio>
#include <vector>

namespace gan::emulator {

static int passed = 0, failed = 0;

void test(const char* name, const std::function<void()>& body) {
  try {
    body();
    ++passed;
    std::printf("ok      %s\n", name);
  } catch (const std::exception& error) {
    ++failed;
    std::printf("FAILED  %s: %s\n", name, error.what());
  }
}

void check(bool is_so, const std::string& what) {
  if (!is_so) throw std::runtime_error(what);
}

std::string outcome(uint32_t ranks, const Options& options,
                    const std::function<void(World&)>& launch) {
  World world(ranks, options);
  launch(world);
  try {
    world.run();
  } catch (const Failure& failure) {
    return failure.what();
  }
  return "";
}

Options seeded(uint64_t seed) {
  Options options;
  options.seed = seed;
  options.schedule = static_cast<Schedule>(seed % 4);
  return options;
}

static constexpr uint64_t kSeeds = 400;

bool for_some_seed(const std::function<bool(const Options&)>& is_so) {
  for (uint64_t seed = 1; seed <= kSeeds; ++seed) {
    if (is_so(seeded(seed))) return true;
  }
  return false;
}
bool for_every_seed(const std::function<bool(const Options&)>& is_so) {
  return !for_some_seed([&](const Options& options) { return !is_so(options); });
}

bool has(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

static Launch shape(uint32_t rank, uint32_t blocks, uint32_t threads) {
  Launch launch;
  launch.rank = rank;
  launch.blocks = blocks;
  launch.threads = threads;
  return launch;
}

static uint32_t poll(const uint32_t* word) {
  uint32_t value = 0;
  while (value == 0) value = load_relaxed_gpu(word);
  return value;
}

// ---- launches ----

static void test_launches() {
  test("every thread of every block runs once", [] {
    std::vector<uint32_t> count(2 * 3 * 64);
    const std::string failure = outcome(2, seeded(1), [&](World& world) {
      for (uint32_t rank = 0; rank < 2; ++rank) {
        world.launch(shape(rank, 3, 64), [&count, rank] {
          check(gridDim.x == 3 && blockDim.x == 64, "gridDim and blockDim are the launch's");
          ++count[(rank * 3 + blockIdx.x) * 64 + threadIdx.x];
        });
      }
    });
    check(failure.empty(), failure);
    for (const uint32_t times : count) check(times == 1, "once");
  });

  test("a launch of a stream starts when the one before has completed", [] {
    const auto starts_too_soon = [](const Options& options, bool starts_early, bool triggers) {
      uint32_t finished = 0;
      bool too_soon = false;
      const std::string failure = outcome(1, options, [&](World& world) {
        world.launch(shape(0, 2, 32), [&, triggers] {
          // Of all blocks but the last, if not of all.
          if (triggers || blockIdx.x == 0) grid_launch_dependents();
          block_sync();
          ++finished;
        });
        Launch second = shape(0, 1, 32);
        second.starts_early = starts_early;
        world.launch(second, [&] {
          too_soon |= finished < 64;
          grid_dependency_wait();
          check(finished == 64, "grid_dependency_wait waits");
        });
      });
      check(failure.empty(), failure);
      return too_soon;
    };
    check(for_every_seed([&](const Options& o) { return !starts_too_soon(o, false, true); }),
          "without PDL never early");
    check(for_some_seed([&](const Options& o) { return starts_too_soon(o, true, true); }),
          "with PDL early in some seed");
    check(for_every_seed([&](const Options& o) {
            uint32_t finished_of_last = 0;
            bool too_soon = false;
            outcome(1, o, [&](World& world) {
              world.launch(shape(0, 2, 1), [&] {
                if (blockIdx.x == 0) grid_launch_dependents();
                if (blockIdx.x == 1) ++finished_of_last;
              });
              Launch second = shape(0, 1, 1);
              second.starts_early = true;
              world.launch(second, [&] { too_soon |= finished_of_last == 0; });
            });
            return !too_soon;
          }),
          "not before all blocks have triggered or left");
  });

  test("a launch that never waits may complete before the one before it", [] {
    check(for_some_seed([](const Options& options) {
            bool first_done = false, second_done = false, overtakes = false, third_waits = true;
            const std::string failure = outcome(1, options, [&](World& world) {
              world.launch(shape(0, 1, 32), [&] {
                grid_launch_dependents();
                for (int i = 0; i < 20; ++i) block_sync();
                first_done = true;
                overtakes |= second_done;
              });
              Launch second = shape(0, 1, 1);
              second.starts_early = true;
              world.launch(second, [&] { second_done = true; });
              world.launch(shape(0, 1, 1), [&] { third_waits = first_done; });
            });
            check(failure.empty() && third_waits, failure);
            return overtakes;
          }),
          "in some seed");
  });

  test("streams of a rank overlap, and an event puts them in order", [] {
    const auto overtakes = [](const Options& options, bool waits) {
      bool first_done = false, overtaken = false;
      outcome(1, options, [&](World& world) {
        uint32_t word = 0;
        world.launch(shape(0, 1, 1), [&first_done, word] {
          for (int i = 0; i < 8; ++i) load_relaxed_gpu(&word);
          first_done = true;
        });
        if (waits) world.wait_for_stream(0, 1, 0);
        Launch second = shape(0, 1, 1);
        second.stream = 1;
        world.launch(second, [&] { overtaken = !first_done; });
        world.run();
      });
      return overtaken;
    };
    check(for_some_seed([&](const Options& o) { return overtakes(o, false); }), "they overlap");
    check(for_every_seed([&](const Options& o) { return !overtakes(o, true); }), "in order");
  });

  test("more can be launched after run", [] {
    uint32_t runs = 0;
    World world(1, Options{});
    for (int i = 0; i < 2; ++i) {
      world.launch(shape(0, 1, 1), [&runs] { ++runs; });
      world.run();
    }
    check(runs == 2, "both ran");
  });

  test("what a kernel throws comes out of run", [] {
    World world(1, Options{});
    world.launch(shape(0, 1, 32), [] {
      if (threadIdx.x == 7) throw std::out_of_range("seven");
      block_sync();
    });
    try {
      world.run();
    } catch (const std::out_of_range&) {
      return;
    }
    check(false, "it does");
  });
}

// ---- waiting ----

static void test_hangs() {
  test("a hang is found, and says who waits where", [] {
    uint32_t never = 0;
    const std::string failure = outcome(2, seeded(2), [&](World& world) {
      world.launch(shape(0, 1, 32), [] {});
      world.launch(shape(1, 3, 64), [&] {
        if (blockIdx.x == 2 && threadIdx.x == 33) poll(&never);
        block_sync();
      });
    });
    check(has(failure, "hang:"), failure);
    check(has(failure, "rank 1 launch 0 block 2: polling at engine_test.cpp:"), failure);
    check(has(failure, "(1 threads, first 33)"), failure);
    check(has(failure, "rank 1 launch 0 block 2: in block_sync at engine_test.cpp:"), failure);
    check(has(failure, "(63 threads, first 0)"), failure);
    check(!has(failure, "rank 0"), failure);
  });

  test("what is written in the end is no hang", [] {
    check(for_every_seed([](const Options& options) {
            uint32_t words[2] = {0, 0};
            return outcome(2, options,
                           [&](World& world) {
                             for (uint32_t rank = 0; rank < 2; ++rank) {
                               world.launch(shape(rank, 2, 32), [&words, rank] {
                                 if (rank == 0) {
                                   if (threadIdx.x == 5) store_relaxed_gpu(&words[0], 1);
                                   poll(&words[1]);
                                 } else {
                                   poll(&words[0]);
                                   store_relaxed_gpu(&words[1], 1);
                                 }
                               });
                             }
                           })
                .empty();
          }),
          "no failure");
  });

  test("reading again without a loop is no hang", [] {
    const uint32_t word = 0;
    const std::string failure = outcome(1, seeded(1), [&](World& world) {
      world.launch(shape(0, 1, 1), [&] {
        for (int i = 0; i < 100; ++i) load_relaxed_gpu(&word);
      });
    });
    check(failure.empty(), failure);
  });

  test("blocks beyond what is resident never start: a hang", [] {
    uint32_t word = 0;
    const auto run = [&](uint32_t resident) {
      word = 0;
      Options options;
      options.resident_blocks = resident;
      return outcome(1, options, [&](World& world) {
        world.launch(shape(0, 3, 32), [&] {
          if (blockIdx.x == 2) store_relaxed_gpu(&word, 1);
          poll(&word);
        });
      });
    };
    check(run(3).empty(), "three fit");
    check(has(run(2), "never started (1 blocks)"), run(2));
  });

  test("any order of blocks", [] {
    check(for_some_seed([](const Options& given) {
            Options options = given;
            options.any_block_order = true;
            options.resident_blocks = 1;
            std::vector<uint32_t> order;
            outcome(1, options, [&](World& world) {
              world.launch(shape(0, 3, 1), [&] { order.push_back(blockIdx.x); });
            });
            return order == std::vector<uint32_t>{2, 0, 1};
          }),
          "2, 0, 1 in some seed");
  });
}

static void test_barriers() {
  test("a shuffle exchanges among all lanes", [] {
    check(for_every_seed([](const Options& options) {
            return outcome(1, options,
                           [&](World& world) {
                             world.launch(shape(0, 2, 64), [] {
                               float sum = static_cast<float>(threadIdx.x % 32);
                               for (uint32_t mask = 16; mask != 0; mask /= 2) {
                                 sum += shuffle_xor(sum, mask);
                               }
                               check(sum == 496.0f, "the sum of 0 to 31");
                             });
                           })
                .empty();
          }),
          "in every seed");
  });

  test("threads that wait at different barriers are found", [] {
    const auto run = [](bool in_warp) {
      return outcome(1, seeded(4), [&](World& world) {
        world.launch(shape(0, 1, 32), [in_warp] {
          if (threadIdx.x % 2 == 0) {
            in_warp ? (void)shuffle_xor(1.0f, 1) : block_sync();
          } else {
            in_warp ? (void)shuffle_xor(1.0f, 1) : block_sync();
          }
        });
      });
    };
    for (const bool in_warp : {false, true}) {
      const std::string failure = run(in_warp);
      check(has(failure, "they diverge") && has(failure, "engine_test.cpp:"), failure);
    }
  });

  test("a thread that leaves while others wait for it is found", [] {
    check(for_every_seed([](const Options& options) {
            const std::string failure = outcome(1, options, [&](World& world) {
              world.launch(shape(0, 1, 64), [] {
                if (threadIdx.x != 40) block_sync();
              });
            });
            return has(failure, "thread 40: leaves the kernel while") ||
                   has(failure, "of which 1 have left the kernel");
          }),
          "in every seed");
  });
}

// ---- time ----

static void test_time() {
  const auto wait_for_deadline = [](const uint32_t* word) {
    const uint64_t start = clock_ns();
    for (uint32_t polls = 1; load_relaxed_gpu(word) == 0; ++polls) {
      if (polls % 64 == 0 && clock_ns() - start > 30'000'000'000) return;
    }
  };

  test("the clock stands still, or goes on where all wait", [&] {
    uint32_t word = 0;
    const auto run = [&](bool time_passes) {
      Options options;
      options.time_passes = time_passes;
      return outcome(1, options, [&](World& world) {
        world.launch(shape(0, 2, 64), [&] { wait_for_deadline(&word); });
      });
    };
    check(has(run(false), "hang:"), "no deadline ends");
    check(run(true).empty(), "deadlines end");
    Options options;
    options.time_passes = true;
    const std::string failure = outcome(
        1, options, [&](World& world) { world.launch(shape(0, 1, 1), [&] { poll(&word); }); });
    check(has(failure, "hang:"), "even so, a hang is one");
  });

  test("one look of so many finds the deadline over", [&] {
    const auto gives_up_early = [&](const Options& given) {
      Options options = given;
      options.time_passes = true;
      options.one_look_late = 4;
      uint32_t word = 0;
      bool early = false;
      outcome(2, options, [&](World& world) {
        world.launch(shape(0, 1, 1), [&] {
          wait_for_deadline(&word);
          early = word == 0;
        });
        world.launch(shape(1, 1, 32), [&] {
          for (int i = 0; i < 40; ++i) block_sync();
          store_relaxed_gpu(&word, 1);
        });
      });
      return early;
    };
    check(for_some_seed(gives_up_early), "while others run");
    check(!for_every_seed(gives_up_early), "not always");
  });

  test("a rank stands still until the clock says so, or for ever", [] {
    const auto run = [](uint64_t until_ns, uint64_t* now) {
      Options options;
      options.time_passes = true;
      options.stalls.push_back({1, 3, until_ns});
      uint32_t words[8] = {};
      World world(2, options);
      world.launch(shape(0, 1, 1), [&] { store_relaxed_gpu(&words[7], 1); });
      world.launch(shape(1, 1, 1), [&] {
        for (int i = 0; i < 6; ++i) store_relaxed_gpu(&words[i], 1);
      });
      world.run();
      *now = world.now_ns();
      return words[0] + words[1] + words[2] + words[3] + words[4] + words[5] + words[7];
    };
    uint64_t now = 0;
    check(run(5'000'000'000, &now) == 7 && now >= 5'000'000'000, "it goes on at its time");
    check(run(Stall::kForEver, &now) == 4, "it made three accesses, and the other rank its own");
  });
}

static void test_repeating() {
  test("a seed repeats a run, whatever the addresses", [] {
    const auto switches = [](uint64_t seed, size_t offset) {
      std::vector<uint32_t> words(4096);
      Options options = seeded(seed);
      options.tear = true;
      World world(2, options);
      for (uint32_t rank = 0; rank < 2; ++rank) {
        world.launch(shape(rank, 2, 64), [&words, rank, offset] {
          store_relaxed_gpu(&words[offset + rank * 128 + threadIdx.x], 1);
          poll(&words[offset + (1 - rank) * 128 + (threadIdx.x * 7) % 64]);
          block_sync();
        });
      }
      world.run();
      return world.switches();
    };
    for (uint64_t seed = 1; seed <= 20; ++seed) {
      check(switches(seed, 0) == switches(seed, 1024), "as many switches");
    }
    check(switches(4, 0) != switches(8, 0), "other seeds, other runs");
  });
}

void test_scheduling() {
  test_launches();
  test_hangs();
  test_barriers();
  test_time();
  test_repeating();
}

}  // namespace gan::emulator

int main() {
  using namespace gan::emulator;
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  test_scheduling();
  test_clusters();
  test_memory();
  test_explorer();
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed != 0;
}
