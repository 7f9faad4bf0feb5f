// The engine's tests of time, and of seeds that repeat a run.
#include <vector>

#include "engine_test.h"

namespace gan::emulator {

static void test_the_clock() {
  const auto wait_for_deadline = [](const uint32_t* word) {
    const uint64_t start = clock_ns();
    for (uint32_t polls = 1; load_word(word) == 0; ++polls) {
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
          store_word(&word, 1);
        });
      });
      return early;
    };
    check(for_some_seed(gives_up_early), "while others run");
    check(!for_every_seed(gives_up_early), "not always");
  });

  test("an eager rank looks at the clock while others run", [&] {
    // Of 64 threads, whether all give up before the last word comes, which is written in the end.
    const auto all_give_up = [&](uint64_t seed, uint32_t eager_rank) {
      Options options;  // in a schedule in which all get turns
      options.seed = seed;
      options.time_passes = true;
      options.one_look_late = 1;
      options.eager_rank = eager_rank;
      uint32_t words[80] = {}, given_up = 0;
      const std::string failure = outcome(2, options, [&](World& world) {
        world.launch(shape(0, 1, 64), [&] {
          wait_for_deadline(&words[threadIdx.x]);
          given_up += words[79] == 0 ? 1 : 0;
        });
        world.launch(shape(1, 1, 1), [&] {
          for (uint32_t i = 0; i < 20'000; ++i) store_word(&words[64 + i % 8], i);
          store_word(&words[79], 1);
        });
      });
      check(failure.empty(), failure);
      return given_up == 64;
    };
    for (uint64_t seed = 1; seed <= 8; ++seed) {
      check(all_give_up(seed, 0), "all of it");
      check(!all_give_up(seed, 1), "of others, not all");
    }
    // Where nothing comes it sleeps in the end, so that the clock goes on, and a hang is found.
    Options options;
    options.time_passes = true;
    options.eager_rank = 0;
    uint32_t word = 0;
    const auto run = [&](const std::function<void()>& kernel) {
      return outcome(1, options, [&](World& world) { world.launch(shape(0, 1, 64), kernel); });
    };
    check(run([&] { wait_for_deadline(&word); }).empty(), "deadlines end");
    check(has(run([&] { poll(&word); }), "hang:"), "a hang is one");
  });

  test("a rank stands still until the clock says so, or for ever", [] {
    const auto run = [](uint64_t until_ns, uint64_t* now) {
      Options options;
      options.time_passes = true;
      options.stalls.push_back({1, 3, until_ns});
      uint32_t words[8] = {};
      World world(2, options);
      world.launch(shape(0, 1, 1), [&] { store_word(&words[7], 1); });
      world.launch(shape(1, 1, 1), [&] {
        for (int i = 0; i < 6; ++i) store_word(&words[i], 1);
      });
      world.run();
      *now = world.now_ns();
      return words[0] + words[1] + words[2] + words[3] + words[4] + words[5] + words[7];
    };
    uint64_t now = 0;
    check(run(5'000'000'000, &now) == 7 && now >= 5'000'000'000, "it goes on at its time");
    check(run(Stall::kForEver, &now) == 4, "it made three accesses, and the other rank its own");
  });

  test("other work can be launched while a rank stands still", [] {
    for (uint64_t seed = 1; seed <= 8; ++seed) {
      Options options = seeded(seed);
      options.time_passes = true;
      options.stalls.push_back({1, 1, 5'000'000'000});
      uint32_t of_stalled[4] = {}, of_other[4] = {};
      World world(2, options);
      world.launch(shape(1, 1, 1), [&] {
        for (uint32_t& word : of_stalled) store_word(&word, 1);
      });
      for (uint32_t& word : of_other) {
        world.launch(shape(0, 1, 1), [&word] { store_word(&word, 1); });
        world.run_except_stalled();
        check(word == 1 && of_stalled[3] == 0 && world.now_ns() == 0, "the other rank runs");
      }
      world.run();
      check(of_stalled[3] == 1 && world.now_ns() >= 5'000'000'000, "then the one that stood still");
    }
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
          store_word(&words[offset + rank * 128 + threadIdx.x], 1);
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

void test_time() {
  test_the_clock();
  test_repeating();
}

}  // namespace gan::emulator
