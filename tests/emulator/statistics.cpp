#include "statistics.h"

#include <map>
#include <optional>

#include "kernels.h"

namespace gan::testing {
namespace {

std::map<std::string, uint64_t>& counts() {
  static std::map<std::string, uint64_t> all;
  return all;
}

void count_if(bool is_so, const char* what) { counts()[what] += is_so ? 1 : 0; }

void count_two_shot(const Case& c, const Call& call, const CallLaunch& launch) {
  const bool is_it = kKernels[call.kernel].algorithm == Algorithm::kTwoShot;
  const LaunchShape& shape = launch.shape;
  const uint64_t rows_of_team = launch.rows / shape.teams;  // of some, one more
  count_if(is_it, "of two_shot");
  count_if(is_it && rows_of_team > shape.lead_rows, "of two_shot with more rows than its lead");
  count_if(is_it && call.row_packs < c.ranks, "of two_shot with less than a pack a rank");
  count_if(is_it && launch.rows < call.rows, "of two_shot with a part of the rows");
}

void count_launch(const Call& call, const LaunchShape& shape) {
  const bool is_cluster = shape.blocks_a_team > 1, is_sandwich = call.post_weight != kNoBuffer;
  count("launches");
  count_if(shape.threads > 32, "of several warps");
  count_if(shape.packs_a_thread > 1, "of several packs a thread");
  count_if(shape.packs_a_thread > 1 && is_sandwich, "of several packs a thread in sandwich form");
  count_if(is_cluster, "of clusters");
  // Pack 0 of the last block's first thread; further packs come in all blocks before this one.
  const uint32_t last_block_begins = (shape.blocks_a_team - 1) * shape.threads;
  const bool last_block_has_packs = call.row_packs > last_block_begins;
  count_if(is_cluster && last_block_has_packs, "of clusters whose last block has packs");
  count_if(is_cluster && shape.threads > 32, "of clusters of several warps");
  count_if(shape.blocks() >= 100, "of large grids");
  count_if(call.rule.trigger == Trigger::kNever, "alone");
  count_if(call.rule.trigger == Trigger::kAtStart, "early at start");
  count_if(call.rule.trigger == Trigger::kAfterPush, "early after push");
  count_if(call.residual == kNoBuffer, "in plain form");
  count_if(call.residual != kNoBuffer && !is_sandwich, "in residual form");
  count_if(is_sandwich, "in sandwich form");
}

}  // namespace

void count(const std::string& what) { ++counts()[what]; }

void count_case(const Case& c) {
  uint64_t exchanges = 0;
  std::optional<Algorithm> last;
  bool alternates = false;
  for (const Call& call : c.calls) {
    const std::vector<CallLaunch> launches = launches_of(c, call);
    count_if(launches.size() > 1, "calls of several launches");
    for (const CallLaunch& launch : launches) {
      count_launch(call, launch.shape);
      count_two_shot(c, call, launch);
    }
    if (!kKernels[call.kernel].exchanges() || launches.empty()) continue;
    exchanges += launches.size();
    alternates = alternates || (last && last != kKernels[call.kernel].algorithm);
    last = kKernels[call.kernel].algorithm;
  }
  count("cases");
  count_if(exchanges > 0, "cases that exchange");
  count_if(alternates, "cases that alternate between kernels");
  count_if(c.first_call + exchanges_of(c) < c.first_call, "cases whose number wraps");
  count_if(c.ranks > 4, "cases of more than four ranks");
}

std::string statistics() {
  std::string text;
  for (const auto& [what, number] : counts())
    text += (text.empty() ? "" : ", ") + what + " " + std::to_string(number);
  return text;
}

}  // namespace gan::testing
