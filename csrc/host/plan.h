// The plan: which kernel a call takes and in which shape. Python makes it (plan.py) as a table of
// rules; here it is only looked up, from values that are equal on all ranks, so that every rank
// launches the same shape.
#pragma once
#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <vector>

#include "device/params.h"

namespace gan {

enum class Algorithm : uint32_t { kOneShot = 0 };

// The fields of plan.Rule, in its order.
struct PlanRule {
  uint32_t max_rows;         // the rule is for calls of at most so many rows
  uint32_t max_row_packs;    // ... of at most so many packs each
  Algorithm algorithm;       //
  uint32_t blocks_a_team;    // blocks (of a cluster) that share a row
  uint32_t max_threads;      // of a block
  Trigger trigger;           //
  uint32_t multiprocessors;  // of a rank, the least of all ranks
};

struct LaunchShape {
  Algorithm algorithm;
  uint32_t teams, blocks_a_team, threads, packs_a_thread;
  Trigger trigger;

  uint32_t blocks() const { return teams * blocks_a_team; }
};

// What a launch may take of an SM: half of what fits, so that the stream's next kernel can be
// resident too. Threads, at 64 registers each (gpu.cuh), and blocks: clusters of more, smaller ones
// were seen not to fit on a GPU that ranks share.
inline constexpr uint32_t kThreadsAMultiprocessor = 512;
inline constexpr uint32_t kBlocksAMultiprocessor = 4;

inline uint32_t divide_up(uint32_t a, uint32_t b) { return (a + b - 1) / b; }

inline LaunchShape shape_of(const PlanRule& rule, uint64_t rows, uint32_t row_packs) {
  constexpr uint32_t kWarp = 32;
  const uint32_t block_packs = divide_up(row_packs, rule.blocks_a_team);
  const uint32_t packs_a_thread = divide_up(block_packs, rule.max_threads);
  const uint32_t threads = divide_up(divide_up(block_packs, packs_a_thread), kWarp) * kWarp;
  const uint32_t blocks_a_multiprocessor =
      std::clamp(kThreadsAMultiprocessor / threads, 1u, kBlocksAMultiprocessor);
  const uint32_t blocks_resident =
      std::min(rule.multiprocessors * blocks_a_multiprocessor, kMaxBlocks);
  const uint32_t teams_resident = std::max(1u, blocks_resident / rule.blocks_a_team);
  return {rule.algorithm,     static_cast<uint32_t>(std::min<uint64_t>(rows, teams_resident)),
          rule.blocks_a_team, threads,
          packs_a_thread,     rule.trigger};
}

// The first rule that takes the call; the last takes all.
inline LaunchShape choose(const std::vector<PlanRule>& rules, uint64_t rows, uint32_t row_packs) {
  if (rules.empty())
    throw std::invalid_argument(
        "rules: at least one is required; got none; take plan.make_rules()");
  for (const PlanRule& rule : rules) {
    if (rows <= rule.max_rows && row_packs <= rule.max_row_packs)
      return shape_of(rule, rows, row_packs);
  }
  return shape_of(rules.back(), rows, row_packs);
}

}  // namespace gan
