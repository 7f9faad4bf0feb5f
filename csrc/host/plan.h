// The plan: which kernel a call takes and in which shape. Python makes it (plan.py) as a table of
// rules; here it is only looked up, from values that are equal on all ranks, so that every rank
// launches the same kernels in the same shape.
#pragma once
#include <algorithm>
#include <cstdint>
#include <iterator>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "device/inbox.h"
#include "device/params.h"

namespace gan {

enum class Algorithm : uint32_t { kOneShot = 0, kTwoShot = 1 };

// Of Algorithm, as algorithm= has it.
inline constexpr const char* kAlgorithmNames[] = {"one_shot", "two_shot"};

inline std::optional<Algorithm> algorithm_named(const std::string& name) {
  for (uint32_t i = 0; i < std::size(kAlgorithmNames); ++i) {
    if (name == kAlgorithmNames[i]) return Algorithm{i};
  }
  return std::nullopt;
}

// The fields of plan.Rule, in its order.
struct PlanRule {
  uint32_t max_rows;       // the rule is for calls of at most so many rows
  uint32_t max_row_packs;  // ... of at most so many packs each
  uint64_t max_packs;      // ... and of at most so many packs together
  Algorithm algorithm;
  uint32_t blocks_a_team;             // blocks (of a cluster) that share a row
  uint32_t max_threads;               // of a block
  uint32_t threads_a_multiprocessor;  // what a launch may take of it; half of what fits, where the
                                      // stream's next kernel is to be resident too
  Trigger trigger;
  uint32_t lead_rows;        // two-shot: TwoShotParams::lead, at most
  uint32_t multiprocessors;  // of a rank, the least of all ranks
};

struct LaunchShape {
  Algorithm algorithm;
  uint32_t teams, blocks_a_team, threads, packs_a_thread;
  Trigger trigger;
  uint32_t lead_rows;

  uint32_t blocks() const { return teams * blocks_a_team; }
};

// At 64 registers a thread (gpu.cuh).
inline constexpr uint32_t kMaxThreadsAMultiprocessor = 1024;
// Shared memory of one, on the GPU that has the least (compute capability 8.6), less what blocks
// take besides their packs.
inline constexpr uint32_t kSharedBytesAMultiprocessor = 90 * 1024;
// Clusters of more, smaller blocks were seen not to fit on a GPU that ranks share.
inline constexpr uint32_t kBlocksAMultiprocessor = 4;

inline uint32_t divide_up(uint32_t a, uint32_t b) { return (a + b - 1) / b; }

// What a block keeps of a row in shared memory, where a thread has several packs.
inline uint32_t kept_bytes(uint32_t packs_a_thread, uint32_t threads) {
  return packs_a_thread == 1 ? 0 : packs_a_thread * threads * kPackBytes;
}

inline LaunchShape shape_of(const PlanRule& rule, uint64_t rows, uint32_t row_packs) {
  constexpr uint32_t kWarp = 32;
  const uint32_t block_packs = divide_up(row_packs, rule.blocks_a_team);
  const uint32_t packs_a_thread = divide_up(block_packs, rule.max_threads);
  const uint32_t threads = divide_up(divide_up(block_packs, packs_a_thread), kWarp) * kWarp;
  const uint32_t fit_by_threads = rule.threads_a_multiprocessor / threads;
  const uint32_t kept = kept_bytes(packs_a_thread, threads);
  const uint32_t fit_by_memory =
      kept == 0 ? kBlocksAMultiprocessor : kSharedBytesAMultiprocessor / kept;
  const uint32_t blocks_a_multiprocessor =
      std::clamp(std::min(fit_by_threads, fit_by_memory), 1u, kBlocksAMultiprocessor);
  const uint32_t blocks_resident =
      std::min(rule.multiprocessors * blocks_a_multiprocessor, kMaxBlocks);
  const uint32_t teams_resident = std::max(1u, blocks_resident / rule.blocks_a_team);
  return {rule.algorithm,     static_cast<uint32_t>(std::min<uint64_t>(rows, teams_resident)),
          rule.blocks_a_team, threads,
          packs_a_thread,     rule.trigger,
          rule.lead_rows};
}

// The first rule, of `wanted` where an algorithm is wanted, that takes the call; the last takes
// all.
inline const PlanRule& choose(const std::vector<PlanRule>& rules, uint64_t rows, uint32_t row_packs,
                              std::optional<Algorithm> wanted = std::nullopt) {
  const PlanRule* last = nullptr;
  const uint64_t packs = std::min<uint64_t>(rows * row_packs, UINT32_MAX);  // plan.NO_LIMIT
  for (const PlanRule& rule : rules) {
    if (wanted && rule.algorithm != *wanted) continue;
    if (std::min<uint64_t>(rows, UINT32_MAX) <= rule.max_rows && row_packs <= rule.max_row_packs &&
        packs <= rule.max_packs)
      return rule;
    last = &rule;
  }
  if (last == nullptr) {
    throw std::invalid_argument(
        "rules: at least one for the algorithm is required; got none; take plan.make_rules()");
  }
  return *last;
}

// Rows that one launch can take.
inline uint64_t max_rows_of(Algorithm algorithm, const InboxLayout& layout, uint32_t row_packs) {
  // A launch counts rows in 32 bits, and a FailureRecord in fewer.
  constexpr uint64_t kMost = uint64_t{1} << FailureRecord::kRowBits;
  const uint64_t row_bytes = uint64_t{row_packs} * kPackBytes;
  return std::min(kMost, algorithm == Algorithm::kOneShot ? layout.one_shot_rows(row_bytes)
                                                          : layout.two_shot_rows(row_bytes));
}

struct PlannedLaunch {
  uint64_t rows;  // 0: the inbox is too small for a row
  const PlanRule* rule;

  LaunchShape shape(uint32_t row_packs) const { return shape_of(*rule, rows, row_packs); }
};

// The next launch of a call of which `rows` are left, at least 1. Where that is more than an inbox
// takes, the plan's choice is that for the part that it takes; unless the other algorithm takes a
// good deal more rows at once.
inline PlannedLaunch next_launch(const std::vector<PlanRule>& rules, const InboxLayout& layout,
                                 uint64_t rows, uint32_t row_packs,
                                 std::optional<Algorithm> wanted) {
  const auto most = [&](Algorithm algorithm) {
    return std::min(rows, max_rows_of(algorithm, layout, row_packs));
  };
  const auto by = [&](Algorithm algorithm) {
    return PlannedLaunch{most(algorithm), &choose(rules, most(algorithm), row_packs, algorithm)};
  };
  if (wanted) return by(*wanted);
  const uint64_t part = std::max(most(Algorithm::kOneShot), most(Algorithm::kTwoShot));
  const PlanRule& planned = choose(rules, part, row_packs);
  const uint64_t rows_as_planned = most(planned.algorithm);
  if (rows_as_planned == part) return {part, &planned};
  constexpr uint64_t kGoodDeal = 8;  // an eighth
  if ((part - rows_as_planned) * kGoodDeal < part) return by(planned.algorithm);
  return by(planned.algorithm == Algorithm::kOneShot ? Algorithm::kTwoShot : Algorithm::kOneShot);
}

}  // namespace gan
