// The engine's tests of memory: torn accesses and old values.
#include <algorithm>

#include "engine_test.h"

namespace gan::emulator {

static void test_tearing() {
  const auto sees_part = [](const Options& given, bool tear) {
    Options options = given;
    options.tear = tear;
    uint4 pack{0, 0, 0, 0};
    uint4 seen{0, 0, 0, 0};
    outcome(2, options, [&](World& world) {
      world.launch(shape(0, 1, 1), [&] { store_relaxed_sys(&pack, {1, 1, 1, 1}); });
      world.launch(shape(1, 1, 1), [&] { seen = load_relaxed_sys(&pack); });
    });
    return seen.x + seen.y + seen.z + seen.w != 0 && seen.x + seen.y + seen.z + seen.w != 4;
  };
  test("16 bytes may arrive in part, where accesses are torn", [&] {
    check(for_some_seed([&](const Options& o) { return sees_part(o, true); }), "in some seed");
    check(for_every_seed([&](const Options& o) { return !sees_part(o, false); }), "otherwise not");
  });
}

// ---- old values ----

enum class Fence { kNone, kGpu, kSystem };
static void fence(Fence which) {
  if (which == Fence::kGpu) fence_gpu();
  if (which == Fence::kSystem) fence_sys();
}

// A thread writes data, then a flag; one of rank `reader` reads the flag, then data. True: the
// flag, but old data.
static bool is_overtaken(const Options& given, uint32_t reader, Fence of_writer, Fence of_reader) {
  uint32_t data[4] = {}, flag[4] = {};
  bool overtaken = false;
  const std::string failure = outcome(2, weak(given), [&](World& world) {
    world.launch(shape(0, 1, 1), [&] {
      store_word(data, 1);
      fence(of_writer);
      store_word(flag, 1);
    });
    Launch second = shape(reader, 1, 1);
    second.stream = 1;
    world.launch(second, [&] {
      const bool is_flagged = load_word(flag) != 0;
      fence(of_reader);
      overtaken = is_flagged && load_word(data) == 0;
    });
  });
  check(failure.empty(), failure);
  return overtaken;
}

static void test_old_values() {
  test("a flag may overtake data, but not where both sides fence, far enough", [] {
    for (const uint32_t reader : {0u, 1u}) {
      const Fence least = reader == 0 ? Fence::kGpu : Fence::kSystem;
      for (const Fence first : {Fence::kNone, Fence::kGpu, Fence::kSystem}) {
        for (const Fence second : {Fence::kNone, Fence::kGpu, Fence::kSystem}) {
          const bool happens = for_some_seed(
              [&](const Options& o) { return is_overtaken(o, reader, first, second); });
          check(happens == (first < least || second < least), "only with both fences never");
        }
      }
    }
  });

  test("a fence hands on what fences brought, from another rank too", [] {
    // Rank 0 to a thread of rank 1, and that one to another of rank 1.
    const auto is_old = [](const Options& given, Fence taken) {
      uint32_t data[4] = {}, first_flag[4] = {}, second_flag[4] = {};
      bool old = false;
      const std::string failure = outcome(2, weak(given), [&](World& world) {
        world.launch(shape(0, 1, 1), [&] {
          store_word(data, 1);
          fence_sys();
          store_word(first_flag, 1);
        });
        world.launch(shape(1, 2, 1), [&, taken] {
          if (blockIdx.x == 0) {
            poll(first_flag);
            fence(taken);
            fence_gpu();
            store_relaxed_gpu(second_flag, 1);
          } else {
            while (load_relaxed_gpu(second_flag) == 0) {
            }
            fence_gpu();
            old = load_word(data) == 0;
          }
        });
      });
      check(failure.empty(), failure);
      return old;
    };
    check(for_every_seed([&](const Options& o) { return !is_old(o, Fence::kSystem); }), "it does");
    check(for_some_seed([&](const Options& o) { return is_old(o, Fence::kGpu); }),
          "one of .gpu scope takes nothing from the other rank");
  });

  test("what a thread has read does not get older", [] {
    check(for_every_seed([](const Options& options) {
            uint32_t word[4] = {};
            bool in_order = true;
            outcome(2, weak(options), [&](World& world) {
              world.launch(shape(0, 1, 1), [&] {
                for (uint32_t i = 1; i <= 20; ++i) store_word(word, i);
              });
              world.launch(shape(1, 1, 32), [&] {
                uint32_t last = 0;
                for (int i = 0; i < 10; ++i) {
                  const uint32_t value = load_word(word);
                  in_order &= value >= last;
                  last = value;
                  if (i % 3 == 0) {
                    // Nor than what the other lanes have read before.
                    const float of_other = shuffle_xor(static_cast<float>(value), 1);
                    warp_sync();
                    last = std::max(last, static_cast<uint32_t>(of_other));
                  }
                }
              });
            });
            return in_order;
          }),
          "in every seed");
  });

  test("a kernel sees all of the kernels before it", [] {
    check(for_every_seed([](const Options& options) {
            uint32_t word[4] = {};
            bool sees = true;
            const std::string failure = outcome(1, weak(options), [&](World& world) {
              world.launch(shape(0, 1, 32), [&] { store_word(word, threadIdx.x + 1); });
              Launch second = shape(0, 1, 32);
              second.starts_early = true;
              world.launch(second, [&] {
                grid_dependency_wait();
                sees &= load_word(word) != 0;
              });
            });
            check(failure.empty(), failure);
            return sees;
          }),
          "in every seed");
  });

  test("a poll ends, although it may read old values", [] {
    check(for_every_seed([](const Options& options) {
            uint32_t word[4] = {};
            return outcome(2, weak(options),
                           [&](World& world) {
                             world.launch(shape(0, 1, 1), [&] { store_word(word, 1); });
                             world.launch(shape(1, 1, 32), [&] {
                               while (load_word(word) == 0) {
                               }
                             });
                           })
                .empty();
          }),
          "in every seed");
  });

  test("one claims, and who fails to has seen the claim", [] {
    check(for_every_seed([](const Options& options) {
            uint32_t word[4] = {};
            uint32_t claims = 0;
            bool all_see = true;
            outcome(1, weak(options), [&](World& world) {
              Launch launch = shape(0, 1, 32);
              launch.blocks = 2;
              world.launch(launch, [&] {
                if (threadIdx.x == 5) claims += claim_once(word) ? 1 : 0;
                block_sync();
                all_see &= load_word(word) == 1;
              });
            });
            return claims == 1 && all_see;
          }),
          "in every seed");
  });
}

void test_memory() {
  test_tearing();
  test_old_values();
}

}  // namespace gan::emulator
