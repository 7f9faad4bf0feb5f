// Small cases in which every order of accesses is run: two ranks that make up to four calls, and
// three that make up to three, with kernels and grids that change from call to call, with and
// without programmatic dependent launch.
#include <cstdio>
#include <sstream>

#include "explorer.h"
#include "harness.h"
#include "kernels.h"
#include "stages.h"

namespace gan::testing {
namespace {

// By kernel, as kKernels has them.
constexpr uint32_t kOneShot = 0, kTwoShot = 1, kLocalNorm = 2;

// A call of so many rows, each by a team of its own unless there are fewer: the grid changes from
// call to call.
struct Shape {
  uint32_t kernel, rows, blocks_a_team = 1, most_teams = 4;
};

struct Exploration {
  uint32_t ranks;
  std::vector<Shape> calls;
  Trigger trigger;
};

// What takes least time comes first: planted bugs are looked for in the first ones.
std::vector<Exploration> explorations() {
  std::vector<Exploration> all;
  for (const Trigger trigger : {Trigger::kNever, Trigger::kAtStart, Trigger::kAfterPush}) {
    // Two kernels in turn on the same memory; a team of several rows, one of them ahead.
    all.push_back({2, {{kTwoShot, 3, 1, 1}, {kOneShot, 2}, {kTwoShot, 3, 1, 1}}, trigger});
    all.push_back({2, {{kTwoShot, 1}, {kTwoShot, 2}, {kTwoShot, 1}, {kOneShot, 2}}, trigger});
    all.push_back({2, {{kOneShot, 1}, {kOneShot, 2}, {kOneShot, 3}, {kOneShot, 1}}, trigger});
    // Two rows in one of these calls would be some 100,000 executions; a second block of a team,
    // without packs of its own, has its own copy of the call number all the same.
    all.push_back({3, {{kOneShot, 1}, {kOneShot, 1, 2}, {kOneShot, 1}}, trigger});
    all.push_back({2, {{kLocalNorm, 1}, {kOneShot, 1, 2}, {kLocalNorm, 3}}, trigger});
  }
  // Pushed by one rank, added by the second, polled by the third.
  all.push_back({3, {{kTwoShot, 1}, {kOneShot, 1, 2}, {kTwoShot, 1}}, Trigger::kAfterPush});
  all.push_back({3, {{kTwoShot, 2, 1, 1}, {kTwoShot, 1}}, Trigger::kAfterPush});
  return all;
}

// A pack a row; each call adds to the residual of the one before.
Case case_of(const Exploration& exploration, DType dtype) {
  Case c;
  c.seed = 1;
  c.ranks = exploration.ranks;
  c.dtype = dtype;
  c.first_call = UINT32_MAX - 1;
  c.eps = 1e-6f;
  c.bias = 1.0f;
  constexpr uint64_t kMostRows = 4;
  const uint64_t bytes = kMostRows * kPackBytes;
  c.buffers = {{kPackBytes, true}, {bytes, true}};
  for (const Shape& shape : exploration.calls) {
    Call call;
    call.kernel = shape.kernel;
    call.rows = shape.rows;
    call.rule = any_call_rule();
    call.rule.algorithm = kKernels[shape.kernel].algorithm.value_or(Algorithm::kOneShot);
    call.rule.blocks_a_team = shape.blocks_a_team;
    call.rule.max_threads = 32;
    call.rule.threads_a_multiprocessor = 32 * shape.most_teams;
    call.rule.trigger = exploration.trigger;
    call.weight = 0;
    call.residual = call.residual_out = 1;
    call.x = static_cast<uint32_t>(c.buffers.size());
    call.norm_out = call.x + 1;
    c.buffers.push_back({bytes, true});
    c.buffers.push_back({bytes, false});
    c.calls.push_back(call);
  }
  c.area_bytes = bytes_of_area(c.ranks, kMostRows, kMostRows, kPackBytes);
  return c;
}

const char* name_of(Trigger trigger) {
  return trigger == Trigger::kNever     ? "no PDL"
         : trigger == Trigger::kAtStart ? "PDL at start"
                                        : "PDL after push";
}

}  // namespace

uint32_t exploration_count() { return static_cast<uint32_t>(explorations().size()); }

std::string run_exploration(uint64_t number, const Limits& limits, std::string& description) {
  const std::vector<Exploration> all = explorations();
  const Exploration& exploration = all[number % all.size()];
  const Case c = case_of(exploration, limits.dtypes[0]);
  std::ostringstream text;
  text << c.ranks << " ranks, calls";
  for (const Shape& shape : exploration.calls)
    text << " " << kKernels[shape.kernel].name << " of " << shape.rows << ",";
  text << " " << name_of(exploration.trigger);
  description = text.str();
  constexpr double kMostSeconds = 60;
  Harness harness(c);
  const emulator::ExploreResult result = emulator::explore(
      [&](const emulator::Options& options) {
        harness.start_again();
        return run_once(harness, options);
      },
      kMostSeconds);
  std::printf("| %s | %llu | %llu | %zu | %.1f s |\n", description.c_str(),
              static_cast<unsigned long long>(result.executions),
              static_cast<unsigned long long>(result.pruned), result.depth, result.seconds);
  if (!result.failure.empty()) return result.failure;
  return result.complete ? "" : "not explored completely in time";
}

}  // namespace gan::testing
