// Runs a stage of tests over the kernels, or one case of it.
//
//   emulate STAGE [--base SEED] [--cases N]   the seeds from SEED on
//   emulate STAGE --seed SEED                 one case, described
//
// For planted bugs, of which only some kernels are built: --dtype bf16|fp16|fp32, --max-ranks N.
// Stops at the first failure, prints what is wrong and how to repeat it, and exits with 1.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <optional>

#include "stages.h"

namespace {

using namespace gan::testing;

struct Arguments {
  const Stage* stage = nullptr;
  uint64_t base = 0;
  std::optional<uint64_t> seed;
  std::optional<uint32_t> cases;
  Limits limits;
};

[[noreturn]] void explain() {
  std::printf("usage: emulate STAGE [--base SEED] [--cases N] | STAGE --seed SEED\nstages:\n");
  for (const Stage& stage : stages()) std::printf("  %-8s %s\n", stage.name, stage.what);
  std::exit(2);
}

gan::DType dtype_of(const char* name) {
  if (std::strcmp(name, "bf16") == 0) return gan::DType::kBFloat16;
  if (std::strcmp(name, "fp16") == 0) return gan::DType::kFloat16;
  if (std::strcmp(name, "fp32") == 0) return gan::DType::kFloat32;
  explain();
}

Arguments parse(int count, char** words) {
  Arguments arguments;
  for (const Stage& stage : stages()) {
    if (count > 1 && std::strcmp(words[1], stage.name) == 0) arguments.stage = &stage;
  }
  if (arguments.stage == nullptr || count % 2 != 0) explain();
  arguments.limits = arguments.stage->limits;
  for (int i = 2; i < count; i += 2) {
    const char *option = words[i], *value = words[i + 1];
    const uint64_t number = std::strtoull(value, nullptr, 10);
    if (std::strcmp(option, "--base") == 0) {
      arguments.base = number;
    } else if (std::strcmp(option, "--seed") == 0) {
      arguments.seed = number;
    } else if (std::strcmp(option, "--cases") == 0) {
      arguments.cases = static_cast<uint32_t>(number);
    } else if (std::strcmp(option, "--max-ranks") == 0) {
      arguments.limits.max_ranks = static_cast<uint32_t>(number);
    } else if (std::strcmp(option, "--dtype") == 0) {
      arguments.limits.dtypes = {dtype_of(value)};
    } else {
      explain();
    }
  }
  return arguments;
}

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

bool is_right(const Arguments& arguments, uint64_t seed) {
  const Stage& stage = *arguments.stage;
  std::string description;
  const std::string wrong = stage.run(seed, arguments.limits, description);
  if (arguments.seed || !wrong.empty())
    std::printf("%s, seed %llu: %s\n", stage.name, static_cast<unsigned long long>(seed),
                description.c_str());
  if (wrong.empty()) return true;
  std::printf("FAILED: %s\nto repeat it: make emulate CASE=%s SEED=%llu\n", wrong.c_str(),
              stage.name, static_cast<unsigned long long>(seed));
  return false;
}

}  // namespace

int main(int count, char** words) {
  const Arguments arguments = parse(count, words);
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  const auto start = std::chrono::steady_clock::now();
  const uint64_t first = arguments.seed.value_or(arguments.base);
  const uint32_t cases = arguments.seed ? 1 : arguments.cases.value_or(arguments.stage->cases);
  for (uint32_t i = 0; i < cases; ++i) {
    if (!is_right(arguments, first + i)) return 1;
  }
  std::printf("%s: %u cases from seed %llu, none wrong, %.1f s\n", arguments.stage->name, cases,
              static_cast<unsigned long long>(first), seconds_since(start));
  return 0;
}
