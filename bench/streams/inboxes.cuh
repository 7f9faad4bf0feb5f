// What is between the ranks: their inboxes, and the calls through them.
#pragma once
#include <memory>
#include <stdexcept>
#include <vector>

#include "host/exchange_setup.h"
#include "host/launch.h"
#include "memory.cuh"
#include "placement.h"

namespace gan::streams {

inline constexpr uint64_t kTimeoutNs = 10ull * 1000 * 1000 * 1000;

// What the Workspaces of all ranks do, for ranks of one process on any of its GPUs: theirs are
// ranks of one GPU (connect_local) or of a process each. All calls fit, so that each is one launch.
class Inboxes {
 public:
  Inboxes(const Placement& placement, uint32_t max_rows, uint32_t hidden)
      : ranks_(placement.ranks), failures_(placement.ranks) {
    const uint64_t bytes = inbox_bytes(ranks_, max_rows, max_rows, hidden * sizeof(Element));
    std::vector<uint8_t*> addresses;
    for (uint32_t r = 0; r < ranks_; ++r) {
      memory_.push_back(std::make_unique<Memory>(placement.device_of(r), bytes));
      memory_.back()->set(0, kHeaderBytes, 0x00);
      memory_.back()->set(kHeaderBytes, bytes - kHeaderBytes, 0xff);
      addresses.push_back(memory_.back()->data());
    }
    for (uint32_t r = 0; r < ranks_; ++r) {
      exchange_.push_back(exchange_params(InboxLayout::of(ranks_, bytes), r, addresses,
                                          timeout_ticks_of(kTimeoutNs), failures_.at(r)));
    }
  }

  // On the rank's device, which is the current one.
  void launch(uint32_t rank, RowParams row, const PlanRule& rule, cudaStream_t stream) const {
    const LaunchShape shape = shape_of(rule, row.rows, row.row_packs);
    row.packs_a_thread = shape.packs_a_thread;
    const FusedParams params{
        row, shape.trigger, exchange_[rank],
        two_shot_params(ranks_, row.rows, row.row_packs, shape.teams, shape.lead_rows)};
    check(launch_fused(DType::kBFloat16, ranks_, params, shape, stream),
          "streams: a fused kernel that starts is required");
  }

  // Once all devices are idle.
  void require_no_failure() const {
    if (!failures_.any()) return;
    throw std::runtime_error("streams: a call ran into its deadline; do all blocks fit at once?");
  }

 private:
  uint32_t ranks_;
  HostWords failures_;
  std::vector<std::unique_ptr<Memory>> memory_;
  std::vector<ExchangeParams> exchange_;
};

}  // namespace gan::streams
