// The engine's tests of the explorer.
#include <algorithm>
#include <iterator>
#include <set>
#include <vector>

#include "engine_test.h"
#include "explorer.h"
#include "memory_map.h"
#include "random.h"

namespace gan::emulator {

static Launch one_thread(uint32_t rank) {
  Launch launch;
  launch.rank = rank;
  launch.threads = 1;
  return launch;
}

// ---- small programs, and all that they can read ----

struct Step {
  enum { kLoad, kStore, kPoll } what;
  uint32_t word, value;
};
using Program = std::vector<std::vector<Step>>;  // of each thread

struct alignas(16) Words {
  uint32_t at[4];  // words of one granule: those that are not contended are told apart
};

// What the threads read, one after the other. Polls end when the word is not zero.
static std::string run_program(const Program& program, const Options& options,
                               std::vector<uint32_t>& read) {
  static Words words;
  words = {};
  std::vector<std::vector<uint32_t>> of_thread(program.size());
  const std::string failure =
      outcome(static_cast<uint32_t>(program.size()), options, [&](World& world) {
        for (uint32_t i = 0; i < program.size(); ++i) {
          world.launch(one_thread(i), [&, i] {
            for (const Step& step : program[i]) {
              uint32_t* word = &words.at[step.word];
              if (step.what == Step::kStore) {
                store_word(word, step.value);
              } else {
                uint32_t value = load_word(word);
                while (step.what == Step::kPoll && value == 0) value = load_word(word);
                of_thread[i].push_back(value);
              }
            }
          });
        }
      });
  read.clear();
  for (const auto& values : of_thread) read.insert(read.end(), values.begin(), values.end());
  return failure;
}

// Takes every choice there is, without any reduction.
class Exhaustive : public Director {
 public:
  uint32_t contended_words(uintptr_t) override { return 15; }
  void found_contended(uintptr_t, uint32_t) override {}
  size_t choose(const std::vector<PendingAccess>& pending) override {
    if (depth_ == choices_.size()) choices_.push_back({0, pending.size()});
    return choices_[depth_++].first;
  }
  bool go_to_next() {
    depth_ = 0;
    while (!choices_.empty() && ++choices_.back().first == choices_.back().second) {
      choices_.pop_back();
    }
    return !choices_.empty();
  }

 private:
  std::vector<std::pair<size_t, size_t>> choices_;  // the one taken, of how many
  size_t depth_ = 0;
};

using Outcomes = std::set<std::vector<uint32_t>>;

static Outcomes outcomes_of_all(const Program& program) {
  Outcomes outcomes;
  Exhaustive director;
  Options options;
  options.schedule = Schedule::kRoundRobin;
  options.director = &director;
  do {
    std::vector<uint32_t> read;
    const std::string failure = run_program(program, options, read);
    outcomes.insert(failure.empty() ? read : std::vector<uint32_t>{~0u});
  } while (director.go_to_next());
  return outcomes;
}

// No thread reads a word twice without a store between: it would pass for a poll.
static Program random_program(Random& random) {
  Program program(2 + random.below(2));
  for (auto& steps : program) {
    bool has_read[2] = {false, false};
    for (uint32_t i = 1 + random.below(4); i > 0; --i) {
      const uint32_t kind = random.below(8), word = random.below(2);
      if (kind >= 4 || has_read[word]) {
        steps.push_back({Step::kStore, word, 1 + random.below(2)});
        has_read[0] = has_read[1] = false;
      } else {
        // Mostly not polls: a program should rarely hang.
        steps.push_back({kind == 0 ? Step::kPoll : Step::kLoad, word, 0});
        has_read[word] = true;
      }
    }
  }
  return program;
}

void test_explorer() {
  test("the explorer runs each order that matters once", [] {
    // Load and store the same word: of the six orders of two threads, two differ in loads only,
    // and so do two others.
    const Program program(2, {{Step::kLoad, 0, 0}, {Step::kStore, 0, 1}});
    Outcomes outcomes;
    const ExploreResult result = explore(
        [&](const Options& options) {
          std::vector<uint32_t> read;
          const std::string failure = run_program(program, options, read);
          outcomes.insert(read);
          return failure;
        },
        10);
    check(result.complete && result.failure.empty(), result.failure);
    check(result.contended_words == 1 && result.beginnings == 2, "one word is contended");
    check(result.executions == 4, std::to_string(result.executions) + " executions");
    check(outcomes == Outcomes{{0, 0}, {0, 1}, {1, 0}}, "what can be read");
  });

  test("the explorer finds what goes wrong in one order", [] {
    static uint32_t word[4];
    const ExploreResult result = explore(
        [](const Options& options) {
          word[0] = 0;
          const std::string failure = outcome(2, options, [](World& world) {
            for (uint32_t rank = 0; rank < 2; ++rank) {
              world.launch(one_thread(rank), [] { store_word(word, load_word(word) + 1); });
            }
          });
          return !failure.empty() ? failure : word[0] == 2 ? "" : "an update is lost";
        },
        10);
    check(result.failure == "an update is lost", result.failure);
  });

  test("what barriers and kernel boundaries order is not contended", [] {
    static uint32_t words[64];
    const ExploreResult result = explore(
        [](const Options& options) {
          return outcome(1, options, [](World& world) {
            for (int kernel = 0; kernel < 2; ++kernel) {
              Launch launch = one_thread(0);
              launch.threads = 32;
              launch.starts_early = true;
              world.launch(launch, [] {
                grid_dependency_wait();
                store_word(&words[threadIdx.x], 1);
                block_sync();
                load_word(&words[31 - threadIdx.x]);
              });
            }
          });
        },
        10);
    check(result.complete && result.failure.empty(), result.failure);
    check(result.executions == 1 && result.contended_words == 0, "one order");
  });

  test("a barrier puts accesses of contended words in order", [] {
    static uint32_t words[4];
    std::set<uint32_t> read;
    const ExploreResult result = explore(
        [&](const Options& options) {
          words[0] = 0;
          uint32_t value = 0;
          const std::string failure = outcome(2, options, [&](World& world) {
            Launch launch = one_thread(0);
            launch.threads = 32;
            world.launch(launch, [] {
              if (threadIdx.x == 0) store_word(words, 1);
              block_sync();
              if (threadIdx.x == 1) store_word(words, 2);
            });
            world.launch(one_thread(1), [&] { value = load_word(words); });
          });
          read.insert(value);
          return failure;
        },
        10);
    check(result.complete && result.failure.empty(), result.failure);
    check(result.executions == 3 && result.pruned == 0 && read == std::set<uint32_t>{0, 1, 2},
          "the load is before, between or after");
  });

  test("two ranks that exchange a word in each of four kernels: 81 orders", [] {
    // Each poll reads before the peer's store or after it, but not both before. As in the product,
    // two places take turns, and who reads, clears.
    static uint32_t inbox[2][4];
    const ExploreResult result = explore(
        [](const Options& options) {
          for (auto& words : inbox) std::fill(std::begin(words), std::end(words), 0);
          return outcome(2, options, [](World& world) {
            for (uint32_t kernel = 0; kernel < 4; ++kernel) {
              for (uint32_t rank = 0; rank < 2; ++rank) {
                world.launch(one_thread(rank), [place = kernel % 2, rank] {
                  store_word(&inbox[1 - rank][place], 1);
                  while (load_word(&inbox[rank][place]) == 0) {
                  }
                  store_word(&inbox[rank][place], 0);
                });
              }
            }
          });
        },
        10);
    check(result.complete && result.failure.empty(), result.failure);
    check(result.executions == 81 && result.pruned == 0,
          std::to_string(result.executions) + " executions, " + std::to_string(result.pruned) +
              " pruned");
  });

  test("the explorer finds a race of ordinary accesses", [] {
    static uint4 pack;
    const ExploreResult result = explore(
        [](const Options& options) {
          return outcome(2, options, [](World& world) {
            for (uint32_t rank = 0; rank < 2; ++rank) {
              world.launch(one_thread(rank), [] { store(&pack, {1, 1, 1, 1}); });
            }
          });
        },
        10);
    check(has(result.failure, "race: "), result.failure);
  });

  test("the explorer reads all that every order reads, in random programs", [] {
    Random random(1);
    for (int i = 0; i < 300; ++i) {
      const Program program = random_program(random);
      const Outcomes all = outcomes_of_all(program);
      // It ends where a run fails, so programs that may hang are not for it.
      if (all.count({~0u}) != 0) continue;
      Outcomes explored;
      const ExploreResult result = explore(
          [&](const Options& options) {
            std::vector<uint32_t> read;
            const std::string failure = run_program(program, options, read);
            explored.insert(read);
            return failure;
          },
          60);
      check(result.complete && result.failure.empty(), result.failure);
      check(explored == all, "program " + std::to_string(i) + ": " +
                                 std::to_string(explored.size()) + " of " +
                                 std::to_string(all.size()) + " outcomes");
    }
  });
}

}  // namespace gan::emulator
