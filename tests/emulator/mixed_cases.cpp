// Two ranks of which one makes a call by one_shot and the other by two_shot, without debug mode: a
// rank waits for packs that nobody sends, until the deadline; or, in a row of one pack, has by
// chance what it needs, and the right result. (Of three ranks and more, two_shot may find all that
// it waits for, and be wrong.)
#include <algorithm>
#include <sstream>

#include "harness.h"
#include "kernels.h"
#include "stages.h"
#include "statistics.h"

namespace gan::testing {
namespace {

Case one_call_of_two_ranks(uint64_t seed, Limits limits) {
  limits.min_ranks = limits.max_ranks = 2;
  limits.min_calls = limits.max_calls = limits.last_exchanges = 1;
  limits.may_repeat = false;
  Case c = random_case(seed, limits);
  // Half of them of rows whose slices are whole strips: only there could the algorithms fill each
  // other's places exactly, but for the gap (kTwoShotGapBytes).
  constexpr uint64_t kOtherSeeds = uint64_t{1} << 32;
  while (seed % 2 == 0 && c.calls.back().row_packs % (2 * kStripPacks) != 0)
    c = random_case(c.seed + kOtherSeeds, limits);
  c.seed = seed;
  Call& call = c.calls.back();
  call.rows = std::max<uint64_t>(call.rows, 1);
  // A launch by either.
  c.area_bytes = bytes_of_area(c.ranks, call.rows, call.rows, row_bytes_of(call));
  return c;
}

Call by_the_other_algorithm(Call call) {
  for (uint32_t other = 0; other < kKernelCount; ++other) {
    if (!kKernels[other].exchanges() || other == call.kernel) continue;
    call.kernel = other;
    call.rule.algorithm = *kKernels[other].algorithm;
    return call;
  }
  throw std::logic_error("kernels: another that exchanges is required");
}

}  // namespace

std::string run_mixed_case(uint64_t seed, const Limits& limits, std::string& description) {
  const Case c = one_call_of_two_ranks(seed, limits);
  emulator::Options options = random_options(seed, c);
  options.time_passes = true;
  std::ostringstream text;
  text << describe(c) << "  rank 1 by the other algorithm; " << describe(options);
  description = text.str();
  count_case(c);
  Harness harness(c);
  emulator::World world(c.ranks, options);
  try {
    for (const Call& call : c.calls) harness.queue(world, 0, call);
    for (const Call& call : c.calls) {
      harness.queue(world, 1,
                    kKernels[call.kernel].exchanges() ? by_the_other_algorithm(call) : call);
    }
    world.run();
  } catch (const emulator::Failure& failure) {
    return failure.what();
  }
  uint32_t failed = 0;
  for (uint32_t rank = 0; rank < c.ranks; ++rank) {
    if (std::string guards = harness.wrong_guards(rank); !guards.empty()) return guards;
    if (harness.memory(rank).failure_bits() != 0) {
      ++failed;
    } else if (std::string wrong = harness.wrong_contents(rank, harness.expected(0));
               !wrong.empty()) {
      return "without a failure, " + wrong;
    }
  }
  if (failed == c.ranks) count("cases in which both ranks fail");
  return failed == 0 ? "no rank reports a failure" : "";
}

}  // namespace gan::testing
