// The plan of the local kernels: the epilogue alone, for one rank, and after an all-reduce that is
// not ours. As plan.py has it for the others, small launches let the next one start early, and
// large ones take whole SMs. Rows of more packs than a block has threads are shared by a cluster,
// where there are clusters.
//
// Measured on half of an H100, 2026-11-28, bench/results/2026-11-28-h100/local_norm.txt, us a call:
// early / whole, 2 rows an SM of hidden 2048 2.60 / 3.44, of hidden 4096 3.42 / 3.18; 4 rows 4.15 /
// 4.42 and 4.71 / 4.44; 16 rows 8.85 / 7.75 and 27.20 / 25.06. (On 2026-11-24 2 rows of hidden 4096
// took 2.86 / 3.16: of the two the rule takes that one.) One row of hidden 5376, 8192, 16384
// by one block 2.66, 2.91, 4.88, by four 1.62, 1.64, 1.97; 256 rows of 8192 by one 9.05, by
// two 7.48.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "device/params.h"
#include "plan.h"

namespace gan {

// With fewer multiprocessors clusters were seen never to start (a share of a GPU under MPS).
inline constexpr uint32_t kMinMultiprocessorsOfClusters = 64;

// max_cluster: blocks that a cluster can have; 1 where there are no clusters.
inline std::vector<PlanRule> local_rules(uint32_t multiprocessors, uint32_t max_cluster,
                                         bool starts_early) {
  constexpr uint32_t kBlock = kMaxThreadsAMultiprocessor / 2;  // threads, and packs of a row
  constexpr double kAnyRows = UINT32_MAX;
  if (multiprocessors < kMinMultiprocessorsOfClusters) max_cluster = 1;
  std::vector<PlanRule> rules;
  const auto add = [&](double rows_a_multiprocessor, uint32_t row_packs, uint32_t blocks,
                       bool early) {
    if (early && !starts_early) return;
    PlanRule rule{};
    const double rows = std::max(1.0, rows_a_multiprocessor * multiprocessors);
    rule.max_rows = static_cast<uint32_t>(std::min(rows, kAnyRows));
    rule.max_row_packs = row_packs;
    rule.max_packs = UINT64_MAX;
    rule.blocks_a_team = std::min(blocks, max_cluster);
    rule.max_threads = kBlock;
    rule.threads_a_multiprocessor = kMaxThreadsAMultiprocessor / (early ? 2 : 1);
    rule.trigger = early ? Trigger::kAtStart : Trigger::kNever;
    rule.lead_rows = 1;
    rule.multiprocessors = multiprocessors;
    rules.push_back(rule);
  };
  add(3, kBlock, 1, true);
  add(kAnyRows, kBlock, 1, false);
  add(0.5, kMaxRowPacks, 4, true);
  add(1, 2 * kBlock, 2, true);
  add(kAnyRows, 2 * kBlock, 2, false);
  add(kAnyRows, kMaxRowPacks, 4, false);
  return rules;
}

}  // namespace gan
