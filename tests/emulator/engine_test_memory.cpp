// The engine's tests of memory: torn accesses, old values, races; and of arithmetic.
#include <algorithm>
#include <vector>

#include "engine_test.h"

namespace gan::emulator {

static Launch threads_of(uint32_t rank, uint32_t threads) {
  Launch launch;
  launch.rank = rank;
  launch.threads = threads;
  return launch;
}

static Options weak(const Options& given) {
  Options options = given;
  options.weak = true;
  return options;
}

static void test_tearing() {
  const auto sees_part = [](const Options& given, bool tear) {
    Options options = given;
    options.tear = tear;
    uint4 pack{0, 0, 0, 0};
    uint4 seen{0, 0, 0, 0};
    outcome(2, options, [&](World& world) {
      world.launch(threads_of(0, 1), [&] { store_relaxed_sys(&pack, {1, 1, 1, 1}); });
      world.launch(threads_of(1, 1), [&] { seen = load_relaxed_sys(&pack); });
    });
    return seen.x + seen.y + seen.z + seen.w != 0 && seen.x + seen.y + seen.z + seen.w != 4;
  };
  test("16 bytes may arrive in part, where accesses are torn", [&] {
    check(for_some_seed([&](const Options& o) { return sees_part(o, true); }), "in some seed");
    check(for_every_seed([&](const Options& o) { return !sees_part(o, false); }), "otherwise not");
  });
}

// ---- old values ----

// Rank 0 writes data, then a flag; rank 1 reads the flag, then data. True: the flag, but old data.
static bool is_overtaken(const Options& given, bool writer_fences, bool reader_fences) {
  uint32_t data[4] = {}, flag[4] = {};
  bool overtaken = false;
  const std::string failure = outcome(2, weak(given), [&](World& world) {
    world.launch(threads_of(0, 1), [&] {
      store_relaxed_gpu(data, 1);
      if (writer_fences) fence_sys();
      store_relaxed_gpu(flag, 1);
    });
    world.launch(threads_of(1, 1), [&] {
      const bool is_flagged = load_relaxed_gpu(flag) != 0;
      if (reader_fences) fence_sys();
      overtaken = is_flagged && load_relaxed_gpu(data) == 0;
    });
  });
  check(failure.empty(), failure);
  return overtaken;
}

static void test_old_values() {
  test("a flag may overtake data, but not where both sides fence", [] {
    for (const bool writer_fences : {false, true}) {
      for (const bool reader_fences : {false, true}) {
        const bool happens = for_some_seed(
            [&](const Options& o) { return is_overtaken(o, writer_fences, reader_fences); });
        check(happens == !(writer_fences && reader_fences), "only with both fences never");
      }
    }
  });

  test("what a thread has read does not get older", [] {
    check(for_every_seed([](const Options& options) {
            uint32_t word[4] = {};
            bool in_order = true;
            outcome(2, weak(options), [&](World& world) {
              world.launch(threads_of(0, 1), [&] {
                for (uint32_t i = 1; i <= 20; ++i) store_relaxed_gpu(word, i);
              });
              world.launch(threads_of(1, 32), [&] {
                uint32_t last = 0;
                for (int i = 0; i < 10; ++i) {
                  const uint32_t value = load_relaxed_gpu(word);
                  in_order &= value >= last;
                  last = value;
                  if (i % 3 == 0) {
                    // Nor what the other lanes have read before.
                    const float of_other = shuffle_xor(static_cast<float>(value), 1);
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
              world.launch(threads_of(0, 32), [&] { store_relaxed_gpu(word, threadIdx.x + 1); });
              Launch second = threads_of(0, 32);
              second.starts_early = true;
              world.launch(second, [&] {
                grid_dependency_wait();
                sees &= load_relaxed_gpu(word) != 0;
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
                             world.launch(threads_of(0, 1), [&] { store_relaxed_gpu(word, 1); });
                             world.launch(threads_of(1, 32), [&] {
                               while (load_relaxed_gpu(word) == 0) {
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
              Launch launch = threads_of(0, 32);
              launch.blocks = 2;
              world.launch(launch, [&] {
                if (threadIdx.x == 5) claims += claim_once(word) ? 1 : 0;
                block_sync();
                all_see &= load_relaxed_gpu(word) == 1;
              });
            });
            return claims == 1 && all_see;
          }),
          "in every seed");
  });
}

// ---- races ----

static void test_races() {
  const auto run = [](const Options& options, bool syncs) {
    uint4 packs[2] = {};
    return outcome(1, weak(options), [&](World& world) {
      world.launch(threads_of(0, 64), [&packs, syncs] {
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
                   has(failure, "block 0 thread 3") && has(failure, "engine_test_memory.cpp:");
          }),
          "in every seed");
    check(for_every_seed([&](const Options& o) { return run(o, true).empty(); }),
          "with a barrier, none");
  });

  test("an ordinary and a relaxed access race, two relaxed ones do not", [] {
    const auto race = [](bool ordinary) {
      uint4 pack{0, 0, 0, 0};
      return outcome(2, weak(seeded(3)), [&](World& world) {
        world.launch(threads_of(0, 1), [&] { store_relaxed_sys(&pack, {1, 1, 1, 1}); });
        world.launch(threads_of(1, 1), [&, ordinary] {
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
        world.launch(threads_of(0, 1), [&] {
          grid_launch_dependents();
          store(&pack, {1, 1, 1, 1});
        });
        Launch second = threads_of(0, 1);
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
        world.launch(threads_of(0, 1), [&, fences] {
          store_relaxed_gpu(word, 1);
          if (fences) fence_sys();
          store_relaxed_gpu(flag, 1);
        });
        world.launch(threads_of(1, 1), [&, fences] {
          while (load_relaxed_gpu(flag) == 0) {
          }
          if (fences) fence_sys();
          store_relaxed_gpu(word, 2);
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
                             world.launch(threads_of(0, 1), [&] { store_relaxed_gpu(word, 1); });
                             world.launch(threads_of(1, 1), [&] {
                               while (load_relaxed_gpu(word) == 0) {
                               }
                               store_relaxed_gpu(word, 2);
                             });
                           })
                .empty();
          }),
          "as does reading what the first stored");
  });

  test("a misaligned access is found", [] {
    uint32_t words[8] = {};
    const std::string failure = outcome(1, Options{}, [&](World& world) {
      world.launch(threads_of(0, 1), [&] {
        const auto aligned = (reinterpret_cast<uintptr_t>(words) + 15) / 16 * 16;
        load(reinterpret_cast<const uint4*>(aligned + 4));
      });
    });
    check(has(failure, "a misaligned address"), failure);
  });
}

// ---- arithmetic ----

static void test_rounding() {
  // Both formats have their values in the order of their bits.
  const auto check_rounding = [](uint32_t bits, uint32_t infinity, float (*widen)(uint32_t),
                                 uint32_t (*round)(float)) {
    for (uint32_t sign : {0u, 0x8000u}) {
      for (bits = 0; bits + 1 < infinity; ++bits) {
        const float low = widen(sign | bits), high = widen(sign | (bits + 1));
        const auto middle = static_cast<float>((double{low} + double{high}) / 2);
        const uint32_t even = bits % 2 == 0 ? bits : bits + 1;
        check(round(low) == (sign | bits), "a value is itself");
        check(round(middle) == (sign | even), "a tie goes to the even one");
        check(round(std::nextafter(middle, low)) == (sign | bits), "down");
        check(round(std::nextafter(middle, high)) == (sign | (bits + 1)), "up");
      }
      check(round(widen(sign | infinity)) == (sign | infinity), "infinity");
    }
    check(round(NAN) == 0x7fff && round(-NAN) == 0x7fff, "NaN is canonical");
    check(is_nan(widen(0x7fff)) && is_nan(widen(0xffff)), "and stays NaN");
  };
  test("fp16 rounds to nearest even", [&] {
    check_rounding(0, 0x7c00, float_of_fp16, fp16_rn);
    check(fp16_rn(65520.0f) == 0x7c00 && fp16_rn(65519.0f) == 0x7bff, "overflow");
    check(fp16_rn(0x1p-25f) == 0 && fp16_rn(0x1.8p-25f) == 1, "underflow");
  });
  test("bf16 rounds to nearest even", [&] {
    check_rounding(0, 0x7f80, [](uint32_t bits) { return floats_of_bf16x2(bits).x; }, bf16_rn);
    check(bf16_rn(0x1.ffp127f) == 0x7f80 && bf16_rn(0x1.fe8p127f) == 0x7f7f, "overflow");
  });
  test("two in a word: the lower half is the first", [] {
    check(bf16x2_rn({1.0f, 2.0f}) == 0x40003f80u, "bf16");
    check(fp16x2_rn({1.0f, 2.0f}) == 0x40003c00u, "fp16");
    check(floats_of_fp16x2(0x40003c00u).y == 2.0f, "and back");
  });
  test("the approximate root is near, and replaceable", [] {
    bool is_exact = true;
    for (float v = 0.1f; v < 10.0f; v *= 1.01f) {
      const float exact = 1.0f / std::sqrt(v);
      const float rough = rsqrt_approximately(v);
      check(std::fabs(rough - exact) < exact * 0x1p-20f, "near");
      is_exact &= rough == exact;
    }
    check(!is_exact, "not exact");
    const auto before = approximate_rsqrt;
    approximate_rsqrt = [](float) { return 3.0f; };
    check(rsqrt_approximately(1.0f) == 3.0f, "replaced");
    approximate_rsqrt = before;
  });
}

void test_memory() {
  test_tearing();
  test_old_values();
  test_races();
  test_rounding();
}

}  // namespace gan::emulator
