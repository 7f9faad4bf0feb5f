// Threads, places and hangs in words.
#include <cstring>
#include <map>

#include "world.h"

namespace gan::emulator {

std::string describe(const Site& site) {
  const char* name = std::strrchr(site.file, '/');
  return std::string(name != nullptr ? name + 1 : site.file) + ":" + std::to_string(site.line);
}

static std::string describe(const Grid& grid, uint32_t block) {
  const Launch& launch = grid.launch;
  std::string words = "rank " + std::to_string(launch.rank);
  if (launch.stream != 0) words += " stream " + std::to_string(launch.stream);
  return words + " launch " + std::to_string(grid.index) + " block " + std::to_string(block);
}

static std::string describe(const Block& block) { return describe(*block.grid, block.index); }

std::string describe(const Thread& thread) {
  return describe(*thread.block) + " thread " + std::to_string(thread.index);
}

std::string World::State::describe_thread(uint32_t number) const {
  for (const Rank& rank : ranks) {
    for (const Stream& stream : rank.streams) {
      for (const auto& grid : stream.grids) {
        const uint32_t index = number - grid->first_thread;
        const Launch& launch = grid->launch;
        if (number < grid->first_thread || index >= launch.blocks * launch.threads) continue;
        return describe(*grid, index / launch.threads) + " thread " +
               std::to_string(index % launch.threads);
      }
    }
  }
  return "a thread";
}

static std::string what_it_does(const Thread& thread, bool rank_stands_still) {
  const std::string site = " at " + describe(thread.site);
  switch (thread.status) {
    case Status::kPolling:
      return "polling" + site;
    case Status::kBlockSync:
      return "in block_sync" + site;
    case Status::kWarpSync:
      return "in warp_sync" + site;
    case Status::kShuffle:
      return "in shuffle_xor" + site;
    case Status::kClusterStart:
      return "in cluster_start" + site;
    case Status::kByteCounter:
      return "in wait_for_bytes" + site;
    case Status::kDependency:
      return "in grid_dependency_wait" + site;
    case Status::kReady:
    case Status::kChoice:
    case Status::kFinished:
      break;
  }
  return rank_stands_still ? "standing still" : "running";
}

std::string World::State::hang_report() const {
  struct Group {
    std::string what;
    uint32_t threads = 0, first = 0;
  };
  std::vector<Group> groups;
  std::map<std::string, size_t> group_of;
  for_each_unfinished_thread([&](const Thread& thread) {
    const bool still = ranks[thread.block->grid->launch.rank].stands_still;
    const std::string what = describe(*thread.block) + ": " + what_it_does(thread, still);
    const auto [found, is_new] = group_of.emplace(what, groups.size());
    if (is_new) groups.push_back({what, 0, thread.index});
    ++groups[found->second].threads;
  });
  std::string report = "hang:";
  for (const Group& group : groups) {
    report += "\n  " + group.what + " (" + std::to_string(group.threads) + " threads, first " +
              std::to_string(group.first) + ")";
  }
  for (size_t rank = 0; rank < ranks.size(); ++rank) {
    for (const Stream& stream : ranks[rank].streams) {
      for (const auto& grid : stream.grids) {
        if (grid->all_started()) continue;
        report += "\n  rank " + std::to_string(rank) + " launch " + std::to_string(grid->index) +
                  ": never started (" + std::to_string(grid->launch.blocks - grid->started) +
                  " blocks)";
      }
    }
  }
  return report;
}

}  // namespace gan::emulator
