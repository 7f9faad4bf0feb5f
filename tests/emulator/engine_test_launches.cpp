// The engine's tests of launches and streams.
#include <vector>

#include "engine_test.h"

namespace gan::emulator {

void test_launches() {
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
          for (int i = 0; i < 8; ++i) load_word(&word);
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

}  // namespace gan::emulator
