// The engine's tests of what threads wait for: hangs, and barriers.
#include <utility>
#include <vector>

#include "engine_test.h"

namespace gan::emulator {

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
    check(has(failure, "rank 1 launch 0 block 2: polling at engine_test_waiting.cpp:"), failure);
    check(has(failure, "(1 threads, first 33)"), failure);
    check(has(failure, "rank 1 launch 0 block 2: in block_sync at engine_test_waiting.cpp:"),
          failure);
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
                                   if (threadIdx.x == 5) store_word(&words[0], 1);
                                   poll(&words[1]);
                                 } else {
                                   poll(&words[0]);
                                   store_word(&words[1], 1);
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
        for (int i = 0; i < 100; ++i) load_word(&word);
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
          if (blockIdx.x == 2) store_word(&word, 1);
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
    using Barrier = void (*)(Site);
    const Barrier of_block = [](Site site) { block_sync(site); };
    const Barrier of_warp = [](Site site) { warp_sync(site); };
    const Barrier shuffle = [](Site site) { shuffle_xor(1.0f, 1, site); };
    const auto run = [](Barrier even, Barrier odd) {
      return outcome(1, seeded(4), [&](World& world) {
        world.launch(shape(0, 1, 32), [even, odd] {
          if (threadIdx.x % 2 == 0) {
            even(Site::here());
          } else {
            odd(Site::here());
          }
        });
      });
    };
    for (const auto& [even, odd] : {std::pair(of_block, of_block), std::pair(of_warp, of_warp),
                                    std::pair(shuffle, shuffle), std::pair(of_warp, shuffle)}) {
      const std::string failure = run(even, odd);
      check(has(failure, "they diverge") && has(failure, "engine_test_waiting.cpp:"), failure);
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

void test_waiting() {
  test_hangs();
  test_barriers();
}

}  // namespace gan::emulator
