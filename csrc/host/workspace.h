// A rank's part of a group: its inbox, its mappings of the peers' inboxes, and the calls through
// them.
#pragma once
#include <cuda_runtime_api.h>

#include <array>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "device/inbox.h"
#include "device/params.h"
#include "host/plan.h"

#define GAN_API __attribute__((visibility("default")))

namespace gan {

// What a call is given besides the workspace. `row.rows`, `row.packs_a_thread` are filled in for
// each launch.
struct CallArguments {
  DType dtype;
  uint64_t rows;
  RowParams row;
  std::optional<Algorithm> algorithm;  // none: the plan's
};

// Debug mode: what every rank was about to call, by rank.
using CallSummaries = std::vector<std::array<uint32_t, kCallFields>>;

class DeviceInbox;

class GAN_API Workspace {
 public:
  // Allocates and empties the inbox on `device`, and loads the kernels. Throws std::runtime_error
  // in words. debug: on all ranks or on none.
  Workspace(int device, uint32_t rank, uint32_t ranks, uint64_t inbox_bytes, uint64_t timeout_ns,
            std::vector<PlanRule> rules, bool debug = false);
  ~Workspace();
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  // To be sent to the peers through the group, and to nobody else.
  std::string ipc_handle() const;
  // One handle a rank, the own one ignored. Maps the peers' inboxes.
  void open_peers(const std::vector<std::string>& handles);
  // Ranks of this process: their inboxes are reached by pointer and live as long as any of them.
  void connect_local(const std::vector<std::shared_ptr<Workspace>>& ranks);

  // Queues the call on `stream`, in several launches where it has more rows than the inbox takes.
  // Calls from several streams run in the order in which they were queued.
  void run(const CallArguments& call, cudaStream_t stream);

  // Whom the first failed call missed.
  std::optional<FailureRecord> failure() const;
  // Takes over what peers have reported to this rank, whose own calls may have had all they needed:
  // failure() has it then. Waits for the inbox to be read; to be called once the device is idle.
  void take_reports();
  bool is_local() const { return !local_inboxes_.empty(); }
  bool is_debug_mode() const { return debug_report_ != nullptr; }
  // Debug mode: compares with the peers' a call that run() does not get: one without rows, or an
  // unfused one. Of the latter it waits for what comes of that, outside of a graph capture.
  void announce(const CallArguments& call, bool unfused, cudaStream_t stream);
  // Debug mode: whether two calls ran at the same time.
  bool has_overlapped() const;
  // Debug mode: what the ranks were about to call, when that was not alike.
  std::optional<CallSummaries> disagreement() const;
  // Unmaps the peers' inboxes, which have never been used, without a farewell. When all ranks have
  // done so, close() frees the own one at once.
  void disconnect();
  // Waits for the device, tells the peers that their inboxes are no longer used from here, unmaps
  // them, and retires the own inbox (see reclaim_inboxes). Does not wait for a peer. False: the
  // device cannot be waited for now, since a stream of it is being captured (that capture is broken
  // by the attempt); no call is taken any more, and the rest is to be done by another close(). Once
  // it is done, close() does nothing.
  bool close() noexcept { return release(false); }

  int device() const { return device_; }
  uint32_t rank() const { return rank_; }
  uint32_t ranks() const { return ranks_; }
  uint64_t inbox_bytes() const { return inbox_bytes_; }

 private:
  void require_unconnected() const;
  void connect(const std::vector<uint8_t*>& inboxes);
  void unmap_peers(bool say_farewell);
  bool release(bool for_the_last_time) noexcept;
  // In the order of calls: a call of ours is what `queue` puts on the stream.
  template <class Queue>
  void queue_in_order(cudaStream_t stream, const Queue& queue);
  void order_after_other_streams(cudaStream_t stream);
  class DebugCall;

  int device_;
  uint32_t rank_, ranks_;
  uint64_t inbox_bytes_;
  uint32_t timeout_ticks_;
  InboxLayout layout_;
  std::vector<PlanRule> rules_;
  ExchangeParams exchange_{};
  std::shared_ptr<DeviceInbox> inbox_;
  std::vector<std::shared_ptr<DeviceInbox>> local_inboxes_;  // of connect_local
  std::vector<uint8_t*> mapped_;            // of open_peers, by rank; null where nothing is mapped
  std::shared_ptr<uint64_t> host_failure_;  // pinned; the device writes it
  std::shared_ptr<DebugReport> debug_report_;  // the same, in debug mode; else null
  bool connected_ = false, closed_ = false;
  std::mutex close_mutex_;
  bool released_ = false;  // all that close() does is done

  std::mutex call_mutex_;  // held while a call is queued

  // Of eager calls: captured ones are put in order by the graph they are in.
  std::optional<cudaStream_t> last_stream_;
  std::shared_ptr<CUevent_st> last_call_;  // recorded once calls come from more than one stream
};

// ---- workspaces by the name of their group, as torch's ops name groups ----
GAN_API void register_workspace(const std::string& group_name,
                                std::shared_ptr<Workspace> workspace);
GAN_API void unregister_workspace(const std::string& group_name);
GAN_API std::shared_ptr<Workspace> find_workspace(const std::string& group_name);  // null: none

// Frees the retired inboxes that no peer uses any more; returns how many are still held. An inbox
// that a lost peer had mapped is held until the process ends.
GAN_API uint32_t reclaim_inboxes() noexcept;

// The epilogue alone, on this device.
GAN_API void run_local(int device, const CallArguments& call, cudaStream_t stream);

// ---- what this machine is ----
struct DeviceInfo {
  std::string name, uuid;
  int major, minor;  // compute capability, or what the kernels were compiled for if that is less
  int multiprocessors, max_cluster;
  uint64_t total_bytes;
};
GAN_API std::string driver_status();  // in words; never throws
GAN_API DeviceInfo device_info(int device);
// Empty when `device` can reach the one of that uuid with native atomics, or is the same one; else
// why not.
GAN_API std::string peer_access(int device, const std::string& peer_uuid);

}  // namespace gan
