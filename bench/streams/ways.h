// The ways to do a call that are compared.
#pragma once
#include <algorithm>
#include <string>
#include <vector>

#include "host/plan.h"
#include "memory.cuh"
#include "options.h"

namespace gan::streams {

// A way to do a call, and how long it took in each replay of all rounds.
struct Way {
  std::string name, path;  // path: the algorithm, of the plan; the shape, of the floor
  PlanRule rule;
  std::vector<double> us{};

  void add(const std::vector<double>& more) { us.insert(us.end(), more.begin(), more.end()); }
};

inline PlanRule rule_of(const Options& o, uint32_t share, Algorithm algorithm, uint32_t teams,
                        uint32_t lead, uint32_t resident) {
  PlanRule rule{};
  rule.max_rows = rule.max_row_packs = UINT32_MAX;
  rule.max_packs = UINT64_MAX;
  rule.algorithm = algorithm;
  rule.blocks_a_team = teams;
  rule.max_threads = o.threads;
  rule.threads_a_multiprocessor = kMaxThreadsAMultiprocessor / resident;
  rule.trigger = resident == 1 ? Trigger::kNever : Trigger{o.trigger};
  rule.lead_rows = lead;
  rule.multiprocessors = share;
  return rule;
}

inline bool has(const std::vector<std::string>& list, const char* item) {
  return std::find(list.begin(), list.end(), item) != list.end();
}

// Of --teams: a row's blocks have a warp of packs each at least, and the team fits into the share.
inline std::vector<uint32_t> teams_of(const Options& o, uint32_t share) {
  std::vector<uint32_t> fit;
  for (uint32_t teams : o.teams) {
    if (teams == 1 || (o.hidden / kPackElements / teams >= 32 && teams <= share))
      fit.push_back(teams);
  }
  return fit;
}

// The floor in all shapes that --teams and --resident ask for, of which the fastest is reported.
inline std::vector<Way> floors_of(const Options& o, uint32_t share) {
  std::vector<Way> floors;
  for (uint32_t teams : teams_of(o, share)) {
    for (uint32_t resident : o.resident) {
      const std::string shape = std::to_string(teams) + (resident == 1 ? "/full" : "");
      floors.push_back(
          {"floor", shape, rule_of(o, share, Algorithm::kOneShot, teams, 1, resident)});
    }
  }
  return floors;
}

// What is to be measured of calls of a size: all that --algorithms, --teams, ... ask for.
inline std::vector<Way> ways_of(const Options& o, uint32_t share) {
  std::vector<Way> ways;
  for (uint32_t teams : teams_of(o, share)) {
    for (uint32_t resident : o.resident) {
      const auto rule = [&](Algorithm algorithm, uint32_t lead) {
        return rule_of(o, share, algorithm, teams, lead, resident);
      };
      const std::string blocks = "/" + std::to_string(teams), full = resident == 1 ? "/full" : "";
      if (has(o.algorithms, kAlgorithmNames[0]))
        ways.push_back({"one-shot" + blocks + full, "", rule(Algorithm::kOneShot, 1)});
      if (!has(o.algorithms, kAlgorithmNames[1])) continue;
      for (uint32_t lead : o.leads) {
        ways.push_back({"two-shot" + blocks + "/" + std::to_string(lead) + full, "",
                        rule(Algorithm::kTwoShot, lead)});
      }
    }
  }
  return ways;
}

}  // namespace gan::streams
