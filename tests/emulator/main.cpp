// Runs a stage of tests over the kernels, or one case of it.
//
//   emulate STAGE [--base SEED] [--cases N]   the seeds from SEED on
//   emulate STAGE --seed SEED                 one case, described
//   emulate list                              each stage: its name, its build, how many cases
//
// For planted bugs, of which only some kernels are built: --dtype bf16|fp16|fp32, --max-ranks N.
// Stops at the first failure, prints what is wrong and how to repeat it, and exits with 1. Where a
// sanitizer or a signal ends it, it still prints how to repeat the case.
#include <signal.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <string>

#include "stages.h"
#include "statistics.h"

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace {

using namespace gan::testing;

struct Arguments {
  std::string program;
  std::string limits_words;  // of the command line, for the command that repeats a case
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

[[noreturn]] void list() {
  for (const Stage& stage : stages())
    std::printf("%s %s %u\n", stage.name, stage.build, stage.cases);
  std::exit(0);
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
  if (count == 2 && std::strcmp(words[1], "list") == 0) list();
  if (arguments.stage == nullptr || count % 2 != 0) explain();
  arguments.program = words[0];
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
    const bool is_limit =
        std::strcmp(option, "--max-ranks") == 0 || std::strcmp(option, "--dtype") == 0;
    if (is_limit) arguments.limits_words += std::string(" ") + option + " " + value;
  }
  return arguments;
}

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// The usual one, or this very program where it is another build or has limits of its own.
std::string how_to_repeat(const Arguments& arguments, uint64_t seed) {
  const Stage& stage = *arguments.stage;
  const std::string number = std::to_string(seed), name = stage.name;
  const std::string usual = std::string("emulator/") + stage.build + "/emulate";
  const size_t size = arguments.program.size();
  const bool is_usual = arguments.limits_words.empty() && size >= usual.size() &&
                        arguments.program.compare(size - usual.size(), usual.size(), usual) == 0;
  return "to repeat it: " +
         (is_usual
              ? "make emulate CASE=" + name + " SEED=" + number
              : arguments.program + " " + name + " --seed " + number + arguments.limits_words) +
         "\n";
}

// ---- the end by a sanitizer or a signal ----

char last_words[1024];  // prepared before each case: nothing may be allocated then
size_t last_words_size = 0;

void prepare_last_words(const std::string& text) {
  last_words_size = text.copy(last_words, sizeof(last_words));
}
void say_last_words() {
  if (write(STDERR_FILENO, last_words, last_words_size) < 0) return;
}
void end_by_signal(int number) {
  say_last_words();
  signal(number, SIG_DFL);
  raise(number);
}
void handle_ends() {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  __sanitizer_set_death_callback(say_last_words);
  const int signals[] = {SIGABRT};  // the sanitizer reports the others
#else
  const int signals[] = {SIGABRT, SIGSEGV, SIGBUS, SIGFPE, SIGILL};
#endif
  static char stack_of_handler[1 << 16];  // that of a thread may be what has overflowed
  stack_t stack = {};
  stack.ss_sp = stack_of_handler;
  stack.ss_size = sizeof(stack_of_handler);
  sigaltstack(&stack, nullptr);
  struct sigaction action = {};
  action.sa_handler = end_by_signal;
  action.sa_flags = SA_ONSTACK | SA_NODEFER;
  for (const int number : signals) sigaction(number, &action, nullptr);
}

bool is_right(const Arguments& arguments, uint64_t seed) {
  const Stage& stage = *arguments.stage;
  const std::string repeat = how_to_repeat(arguments, seed);
  prepare_last_words(std::string(stage.name) + ", seed " + std::to_string(seed) + ": ended; " +
                     repeat);
  std::string description;
  const std::string wrong = stage.run(seed, arguments.limits, description);
  if (arguments.seed || !wrong.empty())
    std::printf("%s, seed %llu: %s\n", stage.name, static_cast<unsigned long long>(seed),
                description.c_str());
  if (wrong.empty()) return true;
  std::printf("FAILED: %s\n%s", wrong.c_str(), repeat.c_str());
  return false;
}

}  // namespace

int main(int count, char** words) {
  const Arguments arguments = parse(count, words);
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  handle_ends();
  const auto start = std::chrono::steady_clock::now();
  const uint64_t first = arguments.seed.value_or(arguments.base);
  const uint32_t cases = arguments.seed ? 1 : arguments.cases.value_or(arguments.stage->cases);
  for (uint32_t i = 0; i < cases; ++i) {
    if (!is_right(arguments, first + i)) return 1;
  }
  prepare_last_words("");
  std::printf("statistics: %s\n", statistics().c_str());
  std::printf("%s: %u cases from seed %llu, none wrong, %.1f s\n", arguments.stage->name, cases,
              static_cast<unsigned long long>(first), seconds_since(start));
  return 0;
}
