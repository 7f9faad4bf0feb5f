#include "host/workspace.h"

#include <algorithm>
#include <cstring>
#include <list>
#include <mutex>
#include <unordered_map>
#include <unordered_set>
#include <utility>

#include "host/cuda_status.h"
#include "host/exchange_setup.h"
#include "host/launch.h"
#include "host/local_plan.h"

namespace gan {

static constexpr const char* kFreeSome = "make max_rows smaller, or free some there";
static constexpr const char* kHasCode = "kernels: a GPU that this build has code for is required";
static constexpr const char* kBuildIt = "build it with GAN_CUDA_ARCHS=native";
static constexpr const char* kIpcNeeds =
    "CUDA IPC needs Linux, one host, and in containers --ipc=host";

// Memory of our own cudaMalloc, not of torch's allocator: what that does with its memory cannot
// break a mapping.
class DeviceInbox {
 public:
  DeviceInbox(int device, uint64_t bytes) : data_(nullptr, Free{device}) {
    DeviceScope scope(device);
    OutsideCapture outside;
    void* memory = nullptr;
    check_cuda(cudaMalloc(&memory, bytes),
               "inbox: " + std::to_string(bytes) + " bytes of device memory are required",
               kFreeSome);
    data_.reset(static_cast<uint8_t*>(memory));
    const std::string what = "inbox: writable device memory is required";
    check_cuda(cudaMemset(data(), 0x00, kHeaderBytes), what);
    check_cuda(cudaMemset(data() + kHeaderBytes, 0xff, bytes - kHeaderBytes), what);
    check_cuda(cudaDeviceSynchronize(), what);
  }

  uint8_t* data() const { return data_.get(); }

  // Whether all ranks but `rank` have said farewell to this inbox. False where CUDA does not tell.
  bool is_deserted(uint32_t rank, uint32_t ranks) const noexcept {
    uint64_t farewell[kMaxRanks];
    try {
      DeviceScope scope(data_.get_deleter().device);
      OutsideCapture outside;
      const void* from = data() + offsetof(InboxHeader, farewell);
      check_cuda(cudaMemcpy(farewell, from, sizeof(farewell), cudaMemcpyDeviceToHost),
                 "inbox: readable device memory is required");
    } catch (const std::exception&) {
      return false;
    }
    for (uint32_t r = 0; r < ranks; ++r) {
      if (r != rank && farewell[r] == 0) return false;
    }
    return true;
  }

 private:
  struct Free {
    int device;
    void operator()(uint8_t* memory) const {
      try {
        DeviceScope scope(device);
        OutsideCapture outside;
        cudaFree(memory);
      } catch (const std::exception&) {
        // At the end of the process CUDA may be gone, and the memory with it.
      }
      cudaGetLastError();
    }
  };
  std::unique_ptr<uint8_t, Free> data_;
};

namespace {

struct RetiredInbox {
  std::shared_ptr<DeviceInbox> inbox;
  uint32_t rank, ranks;
};

// Never destroyed: workspaces may be closed while the process exits.
struct Registry {
  std::mutex mutex;
  std::unordered_map<std::string, std::shared_ptr<Workspace>> by_name;
  std::list<RetiredInbox> retired;
};
Registry& registry() {
  static Registry* instance = new Registry;
  return *instance;
}

// The plans of the local kernels, by device. They are kept, because asking for a device's
// properties takes longer than a launch.
class LocalPlans {
 public:
  LaunchShape shape(int device, uint64_t rows, uint32_t row_packs) {
    const std::lock_guard<std::mutex> lock(mutex_);
    auto found = rules_.find(device);
    if (found == rules_.end()) found = rules_.emplace(device, rules_of(device)).first;
    return shape_of(choose(found->second, rows, row_packs), rows, row_packs);
  }

  // From now on without clusters, for good: several ranks run at the same time on the device. Where
  // their kernels leave no places beside each other, a rank's cluster does not start before they
  // end, and they do not end before that rank comes.
  void share(int device) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (shared_.insert(device).second) rules_.erase(device);
  }

 private:
  std::vector<PlanRule> rules_of(int device) const {
    const DeviceInfo info = device_info(device);
    DeviceScope scope(device);
    check_cuda(preload_kernels(1), kHasCode, kBuildIt);
    const bool shared = shared_.count(device) != 0;
    return local_rules(static_cast<uint32_t>(info.multiprocessors),
                       shared ? 1 : static_cast<uint32_t>(info.max_cluster), info.major >= 9);
  }

  std::mutex mutex_;
  std::unordered_map<int, std::vector<PlanRule>> rules_;
  std::unordered_set<int> shared_;
};

LocalPlans& local_plans() {
  static LocalPlans* plans = new LocalPlans;  // may be asked while the process ends
  return *plans;
}

// Host memory that kernels write, zeros.
template <class T>
std::shared_ptr<T> pinned() {
  OutsideCapture outside;
  void* memory = nullptr;
  check_cuda(cudaHostAlloc(&memory, sizeof(T), cudaHostAllocPortable | cudaHostAllocMapped),
             "workspace: pinned host memory is required", "free some there");
  std::memset(memory, 0, sizeof(T));
  return {static_cast<T*>(memory), [](T* object) {
            OutsideCapture outside;
            cudaFreeHost(object);
            cudaGetLastError();
          }};
}

uint32_t row_packs_of(const CallArguments& call) { return call.row.row_packs; }

uint64_t row_bytes_of(const CallArguments& call) {
  return uint64_t{row_packs_of(call)} * kPackBytes;
}

// Of a launch of that shape: `rows` rows of the call, from `first` on.
RowParams rows_from(const CallArguments& call, uint64_t first, uint64_t rows,
                    const LaunchShape& shape) {
  const uint64_t offset = first * row_bytes_of(call);
  const auto in = [&](const void* p) -> const void* {
    return p == nullptr ? nullptr : static_cast<const uint8_t*>(p) + offset;
  };
  const auto out = [&](void* p) -> void* { return static_cast<uint8_t*>(p) + offset; };
  RowParams part = call.row;
  part.x = in(call.row.x);
  part.residual = in(call.row.residual);
  part.norm_out = out(call.row.norm_out);
  part.residual_out = out(call.row.residual_out);
  part.rows = static_cast<uint32_t>(rows);
  part.packs_a_thread = shape.packs_a_thread;
  return part;
}

}  // namespace

// ---- a workspace's life ----

Workspace::Workspace(int device, uint32_t rank, uint32_t ranks, uint64_t inbox_bytes,
                     uint64_t timeout_ns, std::vector<PlanRule> rules, bool debug)
    : device_(device),
      rank_(rank),
      ranks_(ranks),
      inbox_bytes_(inbox_bytes),
      timeout_ticks_(timeout_ticks_of(timeout_ns)),
      rules_(std::move(rules)) {
  if (ranks < 2 || ranks > kMaxRanks || rank >= ranks) {
    throw std::invalid_argument(
        "ranks: 2 to " + std::to_string(kMaxRanks) + " and rank below it are required; got rank " +
        std::to_string(rank) + " of " + std::to_string(ranks) + "; pass a group's");
  }
  if (inbox_bytes < gan::inbox_bytes(ranks, 1, 1, kPackBytes) ||
      inbox_bytes % kAllocationAlignment != 0) {
    throw std::invalid_argument("inbox_bytes: what inbox_bytes() returns is required; got " +
                                std::to_string(inbox_bytes) + "; ask it");
  }
  choose(rules_, 1, 1);  // throws where there are no rules
  const auto has_clusters = [](const PlanRule& rule) { return rule.blocks_a_team > 1; };
  if (std::none_of(rules_.begin(), rules_.end(), has_clusters)) local_plans().share(device_);
  layout_ = InboxLayout::of(ranks, inbox_bytes);
  reclaim_inboxes();
  DeviceScope scope(device);
  check_cuda(preload_kernels(ranks), kHasCode, kBuildIt);
  inbox_ = std::make_shared<DeviceInbox>(device, inbox_bytes);
  host_failure_ = pinned<uint64_t>();
  if (debug) debug_report_ = pinned<DebugReport>();
  mapped_.assign(ranks, nullptr);
}

Workspace::~Workspace() { release(true); }

void Workspace::require_unconnected() const {
  if (inbox_ != nullptr && !connected_ && !closed_) return;
  throw std::runtime_error(
      "workspace: an open one, not connected yet, is required; got another; call init()");
}

std::string Workspace::ipc_handle() const {
  require_unconnected();
  DeviceScope scope(device_);
  cudaIpcMemHandle_t handle;
  check_cuda(cudaIpcGetMemHandle(&handle, inbox_->data()), "ipc: a GPU with CUDA IPC is required",
             kIpcNeeds);
  return {reinterpret_cast<const char*>(&handle), sizeof(handle)};
}

void Workspace::open_peers(const std::vector<std::string>& handles) {
  require_unconnected();
  if (handles.size() != ranks_) {
    throw std::invalid_argument("handles: one a rank is required; got " +
                                std::to_string(handles.size()) + "; gather them from all ranks");
  }
  DeviceScope scope(device_);
  OutsideCapture outside;
  std::vector<uint8_t*> inboxes(ranks_);
  for (uint32_t r = 0; r < ranks_; ++r) {
    if (r == rank_) {
      inboxes[r] = inbox_->data();
      continue;
    }
    cudaIpcMemHandle_t handle;
    if (handles[r].size() != sizeof(handle)) {
      throw std::invalid_argument("handles: " + std::to_string(sizeof(handle)) +
                                  " bytes each are required; got " +
                                  std::to_string(handles[r].size()) + " from rank " +
                                  std::to_string(r) + "; pass what its ipc_handle() gave");
    }
    std::memcpy(&handle, handles[r].data(), sizeof(handle));
    void* inbox = nullptr;
    check_cuda(
        cudaIpcOpenMemHandle(&inbox, handle, cudaIpcMemLazyEnablePeerAccess),
        "ipc: memory of rank " + std::to_string(r) + " that this process can map is required",
        kIpcNeeds);
    inboxes[r] = mapped_[r] = static_cast<uint8_t*>(inbox);
  }
  connect(inboxes);
}

void Workspace::connect_local(const std::vector<std::shared_ptr<Workspace>>& ranks) {
  require_unconnected();
  if (ranks.size() != ranks_) {
    throw std::invalid_argument("ranks: one workspace a rank is required; got " +
                                std::to_string(ranks.size()) + "; pass those of all ranks");
  }
  std::vector<uint8_t*> inboxes(ranks_);
  for (uint32_t r = 0; r < ranks_; ++r) {
    if (ranks[r] == nullptr || ranks[r]->inbox_ == nullptr || ranks[r]->rank_ != r ||
        ranks[r]->ranks_ != ranks_ || ranks[r]->device_ != device_ ||
        ranks[r]->inbox_bytes_ != inbox_bytes_) {
      throw std::invalid_argument(
          "ranks: open workspaces in rank order, of one device and size, are required; got another "
          "at " +
          std::to_string(r) + "; make all alike");
    }
    inboxes[r] = ranks[r]->inbox_->data();
  }
  DeviceScope scope(device_);
  for (const uint32_t kernels_of : {1u, ranks_}) {
    check_cuda(prefer_shared_memory(kernels_of),
               "kernels: a GPU that divides its memory is required");
  }
  local_plans().share(device_);
  for (const auto& other : ranks) local_inboxes_.push_back(other->inbox_);
  connect(inboxes);
}

void Workspace::connect(const std::vector<uint8_t*>& inboxes) {
  exchange_ = exchange_params(layout_, rank_, inboxes, timeout_ticks_, host_failure_.get());
  connected_ = true;
}

namespace {
struct DuringCapture : std::runtime_error {
  DuringCapture()
      : std::runtime_error(
            "workspace: no stream that is being captured is required; got one; end the capture") {}
};
bool is_of_a_capture(cudaError_t status) {
  return status >= cudaErrorStreamCaptureUnsupported && status <= cudaErrorStreamCaptureWrongThread;
}
}  // namespace

void Workspace::unmap_peers(bool say_farewell) {
  DeviceScope scope(device_);
  OutsideCapture outside;
  const cudaError_t status = cudaDeviceSynchronize();
  if (is_of_a_capture(status)) {
    cudaGetLastError();
    throw DuringCapture();
  }
  check_cuda(status, "workspace: a device that ends its work is required");
  for (uint32_t r = 0; r < ranks_; ++r) {
    if (mapped_[r] == nullptr) continue;
    // The peer frees its inbox once all have written here, maybe in the instant before the
    // unmapping below. CUDA's manual does not define that; nothing is accessed any more, and the
    // mapping of freed memory was seen to stay valid and private until it is closed (H100, driver
    // 580).
    const uint64_t farewell = 1;
    if (say_farewell) {
      cudaMemcpy(mapped_[r] + offsetof(InboxHeader, farewell) + rank_ * sizeof(farewell), &farewell,
                 sizeof(farewell), cudaMemcpyHostToDevice);
    }
    cudaIpcCloseMemHandle(mapped_[r]);
    mapped_[r] = nullptr;
  }
  cudaGetLastError();
}

void Workspace::disconnect() {
  const std::lock_guard<std::mutex> lock(call_mutex_);
  connected_ = false;
  unmap_peers(false);
}

bool Workspace::release(bool for_the_last_time) noexcept {
  {
    // A call that another thread is queueing is queued before the device is waited for.
    const std::lock_guard<std::mutex> lock(call_mutex_);
    closed_ = true;
  }
  const std::lock_guard<std::mutex> lock(close_mutex_);
  if (released_) return true;
  try {
    unmap_peers(true);
  } catch (const DuringCapture&) {
    if (!for_the_last_time) return false;
  } catch (const std::exception&) {
    // The device cannot be waited for: either CUDA is gone, as at the end of the process, or
    // kernels may still run, so that the peers must keep their inboxes. What is mapped stays
    // mapped.
  }
  if (inbox_ != nullptr && local_inboxes_.empty() && connected_) {
    const std::lock_guard<std::mutex> lock(registry().mutex);
    registry().retired.push_back({std::move(inbox_), rank_, ranks_});
  }
  inbox_.reset();
  local_inboxes_.clear();
  released_ = true;
  reclaim_inboxes();
  return true;
}

uint32_t reclaim_inboxes() noexcept {
  Registry& r = registry();
  std::list<RetiredInbox> retired;
  {
    const std::lock_guard<std::mutex> lock(r.mutex);
    retired.swap(r.retired);
  }
  // Without the lock: looking and freeing wait for the device, and calls look up their workspace.
  retired.remove_if(
      [](const RetiredInbox& it) { return it.inbox->is_deserted(it.rank, it.ranks); });
  const std::lock_guard<std::mutex> lock(r.mutex);
  r.retired.splice(r.retired.end(), retired);
  return static_cast<uint32_t>(r.retired.size());
}

// ---- calls ----

std::optional<FailureRecord> Workspace::failure() const {
  const uint64_t bits = __atomic_load_n(host_failure_.get(), __ATOMIC_RELAXED);
  if (bits == 0) return std::nullopt;
  return FailureRecord::of(bits);
}

void Workspace::take_reports() {
  const std::lock_guard<std::mutex> lock(call_mutex_);
  if (closed_ || failure()) return;
  DeviceScope scope(device_);
  OutsideCapture outside;
  uint64_t board[kMaxRanks];
  check_cuda(cudaMemcpy(board, inbox_->data() + offsetof(InboxHeader, board), sizeof(board),
                        cudaMemcpyDeviceToHost),
             "workspace: a readable inbox is required");
  for (const uint64_t record : board) {
    if (record == 0) continue;
    __atomic_store_n(host_failure_.get(), record, __ATOMIC_RELAXED);
    return;
  }
}

bool Workspace::has_overlapped() const {
  return is_debug_mode() && __atomic_load_n(&debug_report_->overlap, __ATOMIC_RELAXED) != 0;
}

std::optional<CallSummaries> Workspace::disagreement() const {
  // Pairs with the fence of enter_call.
  if (!is_debug_mode() || __atomic_load_n(&debug_report_->differs, __ATOMIC_ACQUIRE) == 0)
    return std::nullopt;
  CallSummaries calls(ranks_);
  for (uint32_t r = 0; r < ranks_; ++r) {
    for (uint32_t f = 0; f < kCallFields; ++f)
      calls[r][f] = static_cast<uint32_t>(debug_report_->calls[r][f]);
  }
  return calls;
}

static bool is_capturing(cudaStream_t stream) {
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  check_cuda(cudaStreamIsCapturing(stream, &capture), "stream: a usable one is required");
  return capture != cudaStreamCaptureStatusNone;
}

// Two calls of a workspace that ran at once would use the same call number.
void Workspace::order_after_other_streams(cudaStream_t stream) {
  if (!last_stream_ || *last_stream_ == stream) return;
  if (last_call_ == nullptr) {
    if (is_capturing(*last_stream_)) {
      throw std::runtime_error(
          "stream: an eager call from the stream of the last one, or after the end of its capture, "
          "is required; got one from another stream while that is captured");
    }
    cudaEvent_t event;
    check_cuda(cudaEventCreateWithFlags(&event, cudaEventDisableTiming),
               "stream: an event is required");
    last_call_ = {event, [](cudaEvent_t e) { cudaEventDestroy(e); }};
    check_cuda(cudaEventRecord(event, *last_stream_),
               "stream: the one of the last call is required");
  }
  check_cuda(cudaStreamWaitEvent(stream, last_call_.get()), "stream: a usable one is required");
}

template <class Queue>
void Workspace::queue_in_order(cudaStream_t stream, const Queue& queue) {
  const std::lock_guard<std::mutex> lock(call_mutex_);
  if (!connected_ || closed_) {
    throw std::runtime_error(
        "workspace: an open one, connected to its peers, is required; got a closed one; call "
        "init()");
  }
  // While all calls come from one stream, it has them in order.
  const bool has_order = last_stream_ == stream && last_call_ == nullptr;
  const bool eager = !has_order && !is_capturing(stream);
  if (eager) order_after_other_streams(stream);
  queue();
  if (!eager) return;
  last_stream_ = stream;
  if (last_call_ != nullptr) {
    check_cuda(cudaEventRecord(last_call_.get(), stream), "stream: a usable one is required");
  }
}

static constexpr const char* kStarts = "launch: a kernel that starts is required";

static CallSummary summary_of(const CallArguments& call, bool unfused) {
  const auto bits = [](float value) {
    value += 0.0f;  // -0 is 0
    uint32_t word;
    std::memcpy(&word, &value, sizeof(word));
    return word;
  };
  CallSummary summary;
  summary.at[kFieldRows] = static_cast<uint32_t>(std::min<uint64_t>(call.rows, UINT32_MAX));
  summary.at[kFieldHidden] = static_cast<uint32_t>(call.row.hidden);
  summary.at[kFieldDType] = static_cast<uint32_t>(call.dtype);
  summary.at[kFieldForm] = (call.row.residual != nullptr) + (call.row.post_weight != nullptr);
  summary.at[kFieldAlgorithm] = unfused          ? kUnfusedCall
                                : call.algorithm ? 1 + static_cast<uint32_t>(*call.algorithm)
                                                 : 0;
  summary.at[kFieldWeightDType] = call.row.weights_fp32;
  summary.at[kFieldEps] = bits(call.row.eps);
  summary.at[kFieldWeightBias] = bits(call.row.weight_bias);
  return summary;
}

// What is queued in its life is a call that the ranks compare before; also where it is queued in
// part, for an exception.
class Workspace::DebugCall {
 public:
  DebugCall(Workspace& workspace, const CallArguments& call, bool unfused, cudaStream_t stream)
      : inbox_(workspace.inbox_->data()), stream_(stream) {
    const DebugParams params{workspace.exchange_, summary_of(call, unfused),
                             workspace.debug_report_.get()};
    check_cuda(launch_enter_call(workspace.ranks_, params, stream), kStarts);
  }
  ~DebugCall() { launch_leave_call(inbox_, stream_); }
  DebugCall(const DebugCall&) = delete;
  DebugCall& operator=(const DebugCall&) = delete;

 private:
  uint8_t* inbox_;
  cudaStream_t stream_;
};

void Workspace::announce(const CallArguments& call, bool unfused, cudaStream_t stream) {
  queue_in_order(stream, [&] { DebugCall(*this, call, unfused, stream); });
  if (unfused && !is_capturing(stream))
    check_cuda(cudaStreamSynchronize(stream), "stream: a usable one is required");
}

void Workspace::run(const CallArguments& call, cudaStream_t stream) {
  const auto launch_of = [&](uint64_t rows) {
    return next_launch(rules_, layout_, rows, row_packs_of(call), call.algorithm);
  };
  PlannedLaunch next = launch_of(call.rows);
  if (next.rows == 0) {
    throw std::runtime_error("workspace: room for one row of " +
                             std::to_string(row_bytes_of(call)) + " bytes is required; got " +
                             std::to_string(layout_.area_bytes) +
                             "; call init() with a larger hidden_size or max_rows");
  }
  queue_in_order(stream, [&] {
    std::optional<DebugCall> debug_call;
    if (is_debug_mode()) debug_call.emplace(*this, call, false, stream);
    for (uint64_t first = 0;;) {
      const LaunchShape shape = next.shape(row_packs_of(call));
      const RowParams part = rows_from(call, first, next.rows, shape);
      const FusedParams params{
          part, shape.trigger, exchange_,
          two_shot_params(ranks_, part.rows, part.row_packs, shape.teams, shape.lead_rows)};
      check_cuda(launch_fused(call.dtype, ranks_, params, shape, stream), kStarts);
      first += next.rows;
      if (first >= call.rows) break;
      next = launch_of(call.rows - first);
    }
  });
}

void run_local(int device, const CallArguments& call, cudaStream_t stream) {
  for (uint64_t first = 0, rows = 0; first < call.rows; first += rows) {
    // A row's number and a grid's step from there fit in 32 bits.
    rows = std::min<uint64_t>(call.rows - first, uint64_t{1} << 31);
    const LaunchShape shape = local_plans().shape(device, rows, row_packs_of(call));
    const LocalNormParams params{rows_from(call, first, rows, shape), shape.trigger};
    check_cuda(launch_local_norm(call.dtype, params, shape, stream),
               "launch: a kernel that starts is required");
  }
}

// ---- registry ----

void register_workspace(const std::string& group_name, std::shared_ptr<Workspace> workspace) {
  Registry& r = registry();
  {
    const std::lock_guard<std::mutex> lock(r.mutex);
    r.by_name[group_name].swap(workspace);
  }
  // What was there before may be closed now, without the lock.
}

void unregister_workspace(const std::string& group_name) {
  Registry& r = registry();
  std::shared_ptr<Workspace> removed;  // outlives the lock
  const std::lock_guard<std::mutex> lock(r.mutex);
  const auto found = r.by_name.find(group_name);
  if (found == r.by_name.end()) return;
  removed = std::move(found->second);
  r.by_name.erase(found);
}

std::shared_ptr<Workspace> find_workspace(const std::string& group_name) {
  Registry& r = registry();
  const std::lock_guard<std::mutex> lock(r.mutex);
  const auto found = r.by_name.find(group_name);
  return found == r.by_name.end() ? nullptr : found->second;
}

// ---- what this machine is ----

namespace {

std::string uuid_of(const cudaDeviceProp& properties) {
  static constexpr char kDigits[] = "0123456789abcdef";
  std::string text;
  for (const char byte : properties.uuid.bytes) {
    text += kDigits[(byte >> 4) & 15];
    text += kDigits[byte & 15];
  }
  return text;
}

cudaDeviceProp properties_of(int device) {
  cudaDeviceProp properties;
  check_cuda(cudaGetDeviceProperties(&properties, device), kUsableDevice, kSeeDevices);
  return properties;
}

}  // namespace

std::string driver_status() {
  int devices = 0, driver = 0, runtime = 0;
  const cudaError_t status = cudaGetDeviceCount(&devices);
  cudaDriverGetVersion(&driver);
  cudaRuntimeGetVersion(&runtime);
  cudaGetLastError();
  const auto version = [](int v) {
    return std::to_string(v / 1000) + "." + std::to_string(v % 1000 / 10);
  };
  return std::to_string(status == cudaSuccess ? devices : 0) + " CUDA devices, driver for CUDA " +
         version(driver) + ", runtime " + version(runtime) + ", " + cudaGetErrorName(status);
}

DeviceInfo device_info(int device) {
  const cudaDeviceProp p = properties_of(device);
  DeviceScope scope(device);
  int compiled_for = 0;
  check_cuda(kernel_architecture(&compiled_for), kHasCode, kBuildIt);
  constexpr int kPortableCluster = 8;
  // Code compiled for an older architecture knows neither clusters nor early starts, whatever runs
  // it.
  const int architecture = std::min(p.major * 10 + p.minor, compiled_for);
  return {p.name,
          uuid_of(p),
          architecture / 10,
          architecture % 10,
          p.multiProcessorCount,
          architecture >= 90 ? kPortableCluster : 1,
          p.totalGlobalMem};
}

std::string peer_access(int device, const std::string& peer_uuid) {
  int devices = 0;
  check_cuda(cudaGetDeviceCount(&devices), "device: a CUDA driver is required", "install it");
  for (int peer = 0; peer < devices; ++peer) {
    if (uuid_of(properties_of(peer)) != peer_uuid) continue;
    if (peer == device) return "";
    int can = 0, atomics = 0;
    check_cuda(cudaDeviceCanAccessPeer(&can, device, peer),
               "device: two CUDA devices are required");
    check_cuda(
        cudaDeviceGetP2PAttribute(&atomics, cudaDevP2PAttrNativeAtomicSupported, device, peer),
        "device: two CUDA devices are required");
    if (can == 0) return "no peer access to that GPU";
    if (atomics == 0) return "no native atomics on that GPU's memory";
    return "";
  }
  return "that GPU is not visible to this process; see CUDA_VISIBLE_DEVICES";
}

}  // namespace gan
