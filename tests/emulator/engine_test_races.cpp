// The engine's tests of races, and of accesses that nobody may make.
#include "engine_test.h"

namespace gan::emulator {

void test_races() {
  const auto run = [](const Options& options, bool syncs) {
    uint4 packs[2] = {};
    return outcome(1, weak(options), [&](World& world) {
      world.launch(shape(0, 1, 64), [&packs, syncs] {
        if (threadIdx.x == 40) store(&packs[1], {1, 1, 1, 1});
        if (syncs) block_sync();
        if (threadIdx.x == 3) load(&packs[1]);
      });
    });
  };
  test("ordinary accesses that nothing orders are a race", [&] {
    check(for_every_seed([&](const Options& o) {
            const std::string failure = run(o, false);
            return has(failure, "race: ") && has(failure, "block 0 thread 40") &&
                   has(failure, "block 0 thread 3") && has(failure, "engine_test_races.cpp:");
          }),
          "in every seed");
    check(for_every_seed([&](const Options& o) { return run(o, true).empty(); }),
          "with a barrier, none");
  });

  test("warp_sync orders memory among the lanes, a shuffle does not", [] {
    const auto race = [](const Options& options, bool syncs) {
      uint4 pack{0, 0, 0, 0};
      return outcome(1, weak(options), [&](World& world) {
        world.launch(shape(0, 1, 32), [&, syncs] {
          if (threadIdx.x == 3) store(&pack, {1, 1, 1, 1});
          shuffle_xor(1.0f, 1);
          if (syncs) warp_sync();
          if (threadIdx.x == 2) load(&pack);
        });
      });
    };
    check(for_every_seed([&](const Options& o) { return has(race(o, false), "race: "); }), "found");
    check(for_every_seed([&](const Options& o) { return race(o, true).empty(); }), "no race");
  });

  test("an ordinary and a relaxed access race, two relaxed ones do not", [] {
    const auto race = [](bool ordinary) {
      uint4 pack{0, 0, 0, 0};
      return outcome(2, weak(seeded(3)), [&](World& world) {
        world.launch(shape(0, 1, 1), [&] { store_relaxed_sys(&pack, {1, 1, 1, 1}); });
        world.launch(shape(1, 1, 1), [&, ordinary] {
          ordinary ? store(&pack, {2, 2, 2, 2}) : store_relaxed_sys(&pack, {2, 2, 2, 2});
        });
      });
    };
    check(has(race(true), "race: "), "they do");
    check(race(false).empty(), "they do not");
  });

  test("an early start orders nothing, grid_dependency_wait does", [] {
    const auto race = [](const Options& options, bool waits) {
      uint4 pack{0, 0, 0, 0};
      return outcome(1, weak(options), [&](World& world) {
        world.launch(shape(0, 1, 1), [&] {
          grid_launch_dependents();
          store(&pack, {1, 1, 1, 1});
        });
        Launch second = shape(0, 1, 1);
        second.starts_early = true;
        world.launch(second, [&, waits] {
          if (waits) grid_dependency_wait();
          load(&pack);
        });
      });
    };
    check(for_every_seed([&](const Options& o) { return has(race(o, false), "race: "); }),
          "even where the first has completed");
    check(for_every_seed([&](const Options& o) { return race(o, true).empty(); }), "no race");
  });

  test("strict: relaxed stores that nothing orders", [] {
    const auto race = [](const Options& given, bool fences) {
      Options options = weak(given);
      options.strict = true;
      uint32_t word[4] = {}, flag[4] = {};
      return outcome(2, options, [&](World& world) {
        world.launch(shape(0, 1, 1), [&, fences] {
          store_word(word, 1);
          if (fences) fence_sys();
          store_word(flag, 1);
        });
        world.launch(shape(1, 1, 1), [&, fences] {
          while (load_word(flag) == 0) {
          }
          if (fences) fence_sys();
          store_word(word, 2);
        });
      });
    };
    check(for_every_seed([&](const Options& o) { return has(race(o, false), "race: "); }), "found");
    check(for_every_seed([&](const Options& o) { return race(o, true).empty(); }),
          "fences order them");
    check(for_every_seed([](const Options& given) {
            Options options = weak(given);
            options.strict = true;
            uint32_t word[4] = {};
            return outcome(2, options,
                           [&](World& world) {
                             world.launch(shape(0, 1, 1), [&] { store_word(word, 1); });
                             world.launch(shape(1, 1, 1), [&] {
                               while (load_word(word) == 0) {
                               }
                               store_word(word, 2);
                             });
                           })
                .empty();
          }),
          "as does reading what the first stored");
  });

  test("accesses of .gpu scope where another rank comes, too, are found", [] {
    const auto run = [](uint32_t rank, bool gpu_first, bool in_one_run) {
      uint32_t words[4] = {};
      World world(2, seeded(1));
      const auto access = [&](bool of_gpu) {
        of_gpu ? store_relaxed_gpu(words, 1) : (void)load_word(words);
      };
      try {
        world.launch(shape(0, 1, 1), [&, gpu_first] { access(gpu_first); });
        if (!in_one_run) world.run();
        world.launch(shape(rank, 1, 1), [&, gpu_first] { access(!gpu_first); });
        // The next word is another.
        world.launch(shape(0, 1, 1), [&] { load_relaxed_gpu(words + 1); });
        world.launch(shape(1, 1, 1), [&] { load_word(words + 2); });
        world.run();
      } catch (const Failure& failure) {
        return std::string(failure.what());
      }
      return std::string();
    };
    for (const bool gpu_first : {false, true}) {
      check(has(run(1, gpu_first, true), "race: .gpu accesses of two ranks"), "whichever is first");
      check(run(0, gpu_first, true).empty(), "in one rank, none");
      check(run(1, gpu_first, false).empty(), "in two runs, none");
    }
  });

  test("a misaligned access is found", [] {
    uint32_t words[8] = {};
    const std::string failure = outcome(1, Options{}, [&](World& world) {
      world.launch(shape(0, 1, 1), [&] {
        const auto aligned = (reinterpret_cast<uintptr_t>(words) + 15) / 16 * 16;
        load(reinterpret_cast<const uint4*>(aligned + 4));
      });
    });
    check(has(failure, "a misaligned address"), failure);
  });
}

}  // namespace gan::emulator
