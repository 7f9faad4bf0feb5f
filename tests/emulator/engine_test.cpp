// Tests of the engine itself: that it runs what it should, and finds what it should find.
#include "engine_test.h"

#include <cstdio>

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

Options weak(const Options& given) {
  Options options = given;
  options.weak = true;
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

Launch shape(uint32_t rank, uint32_t blocks, uint32_t threads) {
  Launch launch;
  launch.rank = rank;
  launch.blocks = blocks;
  launch.threads = threads;
  return launch;
}

bool has(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

}  // namespace gan::emulator

int main() {
  using namespace gan::emulator;
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  test_launches();
  test_waiting();
  test_time();
  test_clusters();
  test_memory();
  test_races();
  test_arithmetic();
  test_explorer();
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed != 0;
}
