// The engine's tests of clusters and of shared memory.
#include <vector>

#include "engine_test.h"

namespace gan::emulator {

struct Received {
  float value[4];
  ByteCounter counter;
};

static Launch cluster(uint32_t blocks, uint32_t cluster_blocks) {
  Launch launch;
  launch.blocks = blocks;
  launch.threads = 32;
  launch.cluster_blocks = cluster_blocks;
  return launch;
}

// Every block sends its number to all blocks of its cluster.
static void exchange(std::vector<float>& sums) {
  auto& received = block_shared<Received>();
  const Cluster place = this_cluster();
  if (threadIdx.x == 0) init_byte_counter(&received.counter);
  cluster_start();
  if (threadIdx.x < place.blocks) {
    store_counted(threadIdx.x, &received.value[place.block], static_cast<float>(blockIdx.x + 1),
                  &received.counter);
  }
  if (threadIdx.x == 0) expect_bytes(&received.counter, place.blocks * sizeof(float));
  wait_for_bytes(&received.counter, 0);
  if (threadIdx.x == 31) {
    for (uint32_t i = 0; i < place.blocks; ++i) sums[blockIdx.x] += received.value[i];
  }
}

void test_clusters() {
  test("blocks of a cluster exchange by store_counted", [] {
    check(for_every_seed([](const Options& options) {
            std::vector<float> sums(4);
            const std::string failure = outcome(1, options, [&](World& world) {
              world.launch(cluster(4, 2), [&] { exchange(sums); });
            });
            check(failure.empty(), failure);
            return sums == std::vector<float>{3, 3, 7, 7};
          }),
          "the sums of both");
  });

  test("a store arrives some time later", [] {
    const auto is_seen_at_once = [](const Options& options) {
      bool seen = false;
      outcome(1, options, [&](World& world) {
        world.launch(cluster(1, 1), [&] {
          auto& received = block_shared<Received>();
          if (threadIdx.x == 0) {
            init_byte_counter(&received.counter);
            expect_bytes(&received.counter, sizeof(float));
            store_counted(0, received.value, 1.0f, &received.counter);
            seen = received.value[0] == 1.0f;
            wait_for_bytes(&received.counter, 0);
          }
          block_sync();
        });
      });
      return seen;
    };
    check(for_some_seed(is_seen_at_once), "at once in some seed");
    check(!for_every_seed(is_seen_at_once), "not in all");
  });

  test("the phases of a counter alternate", [] {
    struct Turns {
      float value[2];
      ByteCounter counter[2];
    };
    check(for_every_seed([](const Options& options) {
            const std::string failure = outcome(1, options, [&](World& world) {
              world.launch(cluster(2, 2), [] {
                auto& received = block_shared<Turns>();
                const Cluster place = this_cluster();
                if (threadIdx.x < 2) init_byte_counter(&received.counter[threadIdx.x]);
                cluster_start();
                for (uint32_t turn = 0; turn < 6; ++turn) {
                  // The other block may be a turn ahead, not two.
                  const auto value = static_cast<float>(turn);
                  ByteCounter* counter = &received.counter[turn % 2];
                  if (threadIdx.x == 0) {
                    store_counted(1 - place.block, &received.value[turn % 2], value, counter);
                    expect_bytes(counter, sizeof(float));
                  }
                  wait_for_bytes(counter, turn / 2 % 2);
                  check(received.value[turn % 2] == value, "the value of this turn");
                  block_sync();
                }
              });
            });
            return failure.empty();
          }),
          "six turns");
  });

  test("with a counted store goes what its lane has fenced, or lanes it met in warp_sync", [] {
    const auto is_old = [](const Options& given, bool fences, bool syncs) {
      Options options = given;
      options.weak = true;
      uint32_t word[4] = {};
      bool old = false;
      const std::string failure = outcome(1, options, [&](World& world) {
        world.launch(cluster(2, 2), [&, fences, syncs] {
          auto& received = block_shared<Received>();
          if (threadIdx.x == 0) init_byte_counter(&received.counter);
          cluster_start();
          if (blockIdx.x == 0) {
            if (threadIdx.x == 1) store_relaxed_gpu(word, 1);
            if (threadIdx.x == 1 && fences) fence_gpu();
            shuffle_xor(1.0f, 1);
            if (syncs) warp_sync();
            if (threadIdx.x == 0) store_counted(1, received.value, 1.0f, &received.counter);
          } else {
            if (threadIdx.x == 0) expect_bytes(&received.counter, sizeof(float));
            wait_for_bytes(&received.counter, 0);
            old |= load_relaxed_gpu(word) == 0;
          }
        });
      });
      check(failure.empty(), failure);
      return old;
    };
    check(for_every_seed([&](const Options& o) { return !is_old(o, true, true); }), "it does");
    check(for_some_seed([&](const Options& o) { return is_old(o, false, true); }), "not fenced");
    check(for_some_seed([&](const Options& o) { return is_old(o, true, false); }), "not met");
  });

  test("leaving while stores are under way is found", [] {
    const auto run = [](const Options& options) {
      return outcome(1, options, [&](World& world) {
        world.launch(cluster(2, 2), [] {
          auto& received = block_shared<Received>();
          if (threadIdx.x == 0) init_byte_counter(&received.counter);
          cluster_start();
          if (threadIdx.x == 0) {
            store_counted(1 - blockIdx.x, received.value, 1.0f, &received.counter);
          }
        });
      });
    };
    for (const char* what : {"leaves the kernel while stores of other blocks",
                             "a store to a block whose threads have left the kernel"}) {
      check(for_some_seed([&](const Options& o) { return has(run(o), what); }), what);
    }
  });

  test("a counter must be there, and is counted on once a phase", [] {
    const auto run = [](bool initialises) {
      return outcome(1, seeded(1), [&](World& world) {
        world.launch(cluster(1, 1), [initialises] {
          auto& received = block_shared<Received>();
          if (threadIdx.x != 0) return;
          if (initialises) init_byte_counter(&received.counter);
          expect_bytes(&received.counter, 4);
          expect_bytes(&received.counter, 4);
        });
      });
    };
    check(has(run(false), "not been initialised"), run(false));
    check(has(run(true), "twice in one phase"), run(true));
  });

  test("bytes that never come are a hang", [] {
    const std::string failure = outcome(1, seeded(1), [](World& world) {
      world.launch(cluster(2, 2), [] {
        auto& received = block_shared<Received>();
        if (threadIdx.x == 0) init_byte_counter(&received.counter);
        cluster_start();
        wait_for_bytes(&received.counter, 0);
      });
    });
    check(has(failure, "block 1: in wait_for_bytes at engine_test_clusters.cpp:"), failure);
  });

  test("clusters start whole", [] {
    const auto run = [](uint32_t resident) {
      Options options;
      options.resident_blocks = resident;
      return outcome(1, options,
                     [](World& world) { world.launch(cluster(4, 2), [] { cluster_start(); }); });
    };
    check(run(3).empty(), "one after the other");
    check(has(run(1), "never started (4 blocks)"), run(1));
  });

  test("shared memory is the block's own, and not initialised", [] {
    const std::string failure = outcome(1, seeded(1), [](World& world) {
      Launch launch = cluster(2, 1);
      launch.dynamic_shared_bytes = 128;
      world.launch(launch, [] {
        auto& received = block_shared<Received>();
        auto* dynamic = block_dynamic_shared<uint32_t>();
        if (threadIdx.x == 0) {
          check(is_nan(received.value[0]) && dynamic[31] == ~0u, "poisoned");
          dynamic[0] = blockIdx.x;
        }
        block_sync();
        check(dynamic[0] == blockIdx.x, "its own");
      });
    });
    check(failure.empty(), failure);
  });
}

}  // namespace gan::emulator
