// How calls are timed: by replays of graphs in which every rank's stream has kCallsAGraph calls.
//
// Ranks on one GPU: one graph forks to all ranks, from event to event around each replay.
//
// Ranks on several GPUs: each rank has a graph of its own, since one over several GPUs would start
// them at different times. Before each replay the ranks meet on the GPUs, in a fused call of one
// row; then, on every rank's stream, an event, the replay, an event. A replay's time is that of the
// slowest rank. The host queues all of it behind a kernel that waits for the host, so that its own
// time is in none of it (as bench/harness/measure.py does). In each replay it queues a whole rank
// after the other: where a queue is full, what is in it can end without what is still to come.
#pragma once
#include <algorithm>
#include <memory>
#include <stdexcept>
#include <vector>

#include "device/gpu.cuh"
#include "inboxes.cuh"

namespace gan::streams {

inline constexpr int kCallsAGraph = 20;
inline constexpr int kWarmUps = 5, kReplays = 30;
inline constexpr uint64_t kMostWaitNs = 50 * 1000 * 1000;

// By one thread. Ends by itself too: a full queue stops the host before it gives the word.
static __global__ void wait_for_host(const volatile uint64_t* word) {
  const uint64_t begin = clock_ns();
  while (*word == 0 && clock_ns() - begin < kMostWaitNs) {
  }
}

// Where the ranks come together.
class Meeting {
 public:
  explicit Meeting(const Placement& placement) : inboxes_(placement, 1, kHidden) {
    for (uint32_t r = 0; r < placement.ranks; ++r)
      data_.push_back(std::make_unique<RankData>(placement.device_of(r), r, kHidden));
  }

  // On the rank's device, which is the current one.
  void join(uint32_t rank, cudaStream_t stream) const {
    const RankData& data = *data_[rank];
    inboxes_.launch(rank, row_params(data, data.residual, 1, kHidden), rule(), stream);
  }
  void require_no_failure() const { inboxes_.require_no_failure(); }

 private:
  static constexpr uint32_t kHidden = 256;

  static PlanRule rule() {
    PlanRule rule{};
    rule.algorithm = Algorithm::kOneShot;
    rule.blocks_a_team = rule.lead_rows = rule.multiprocessors = 1;
    rule.max_threads = kMaxThreadsAMultiprocessor / 2;
    rule.threads_a_multiprocessor = kMaxThreadsAMultiprocessor;
    rule.trigger = Trigger::kNever;
    return rule;
  }

  Inboxes inboxes_;
  std::vector<std::unique_ptr<RankData>> data_;
};

// A rank's stream, and the events around each of its replays; all of the rank's device.
class RankStream {
 public:
  explicit RankStream(int device) : device_(device) {
    DeviceScope scope(device);
    check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
    for (int i = 0; i < kWarmUps + kReplays; ++i) {
      check(cudaEventCreate(&begin_[i]));
      check(cudaEventCreate(&end_[i]));
    }
  }
  ~RankStream() {
    free_on(device_, [&] {
      for (cudaEvent_t event : begin_) cudaEventDestroy(event);
      for (cudaEvent_t event : end_) cudaEventDestroy(event);
      cudaStreamDestroy(stream_);
    });
  }
  RankStream(const RankStream&) = delete;
  RankStream& operator=(const RankStream&) = delete;

  cudaStream_t stream() const { return stream_; }

  // Device and stream are the rank's.
  void replay(int i, cudaGraphExec_t graph) {
    check(cudaEventRecord(begin_[i], stream_));
    check(cudaGraphLaunch(graph, stream_));
    check(cudaEventRecord(end_[i], stream_));
  }
  bool has_begun() const { return cudaEventQuery(begin_[0]) == cudaSuccess; }
  double us(int i) const {
    DeviceScope scope(device_);
    float ms = 0;
    check(cudaEventElapsedTime(&ms, begin_[i], end_[i]));
    return ms * 1e3;
  }

 private:
  int device_;
  cudaStream_t stream_ = nullptr;
  cudaEvent_t begin_[kWarmUps + kReplays] = {}, end_[kWarmUps + kReplays] = {};
};

class Timing {
 public:
  explicit Timing(const Placement& placement) : placement_(placement), go_(1) {
    for (uint32_t r = 0; r < placement.ranks; ++r)
      ranks_.push_back(std::make_unique<RankStream>(placement.device_of(r)));
    if (placement.gpus > 1) meeting_ = std::make_unique<Meeting>(placement);
    load();
    synchronize(placement.gpus);
  }

  // Of each replay, microseconds a call until the slowest rank is done. launch(rank, stream) puts a
  // call of the rank on the stream; the rank's device is the current one.
  template <class Launch>
  std::vector<double> us(const Launch& launch) {
    for (int i = 0; i < 3; ++i) launch_all(launch);
    synchronize(placement_.gpus);
    return placement_.gpus == 1 ? of_one_graph(launch) : of_a_graph_a_rank(launch);
  }

 private:
  // All kernels but the ranks' own: loading one later may wait for those that wait for the host or
  // for a peer.
  void load() const {
    cudaFuncAttributes unused;
    for (uint32_t device = 0; device < placement_.gpus; ++device) {
      DeviceScope scope(static_cast<int>(device));
      check(cudaFuncGetAttributes(&unused, wait_for_host));
      check(preload_kernels(1));
      check(preload_kernels(placement_.ranks));
    }
  }

  template <class Launch>
  void launch_one(uint32_t rank, const Launch& launch) const {
    DeviceScope scope(placement_.device_of(rank));
    launch(rank, stream(rank));
  }
  template <class Launch>
  void launch_all(const Launch& launch) const {
    for (uint32_t r = 0; r < placement_.ranks; ++r) launch_one(r, launch);
  }
  cudaStream_t stream(uint32_t rank) const { return ranks_[rank]->stream(); }

  // Device and stream are those of the capture.
  static cudaGraphExec_t end_capture(cudaStream_t stream) {
    cudaGraph_t graph;
    cudaGraphExec_t executable;
    check(cudaStreamEndCapture(stream, &graph), "graph: a capture that works is required");
    check(cudaGraphInstantiate(&executable, graph, 0), "graph: room for one is required");
    check(cudaGraphDestroy(graph));
    return executable;
  }

  template <class Launch>
  std::vector<double> of_one_graph(const Launch& launch) {
    cudaEvent_t fork, join, begin, end;
    for (cudaEvent_t* event : {&fork, &join, &begin, &end}) check(cudaEventCreate(event));
    check(cudaStreamBeginCapture(stream(0), cudaStreamCaptureModeRelaxed));
    check(cudaEventRecord(fork, stream(0)));
    for (uint32_t r = 1; r < placement_.ranks; ++r) check(cudaStreamWaitEvent(stream(r), fork));
    for (int i = 0; i < kCallsAGraph; ++i) launch_all(launch);
    for (uint32_t r = 1; r < placement_.ranks; ++r) {
      check(cudaEventRecord(join, stream(r)));
      check(cudaStreamWaitEvent(stream(0), join));
    }
    const cudaGraphExec_t graph = end_capture(stream(0));
    std::vector<double> us;
    for (int i = 0; i < kWarmUps + kReplays; ++i) {
      check(cudaEventRecord(begin, stream(0)));
      check(cudaGraphLaunch(graph, stream(0)));
      check(cudaEventRecord(end, stream(0)));
      check(cudaEventSynchronize(end));
      float ms = 0;
      check(cudaEventElapsedTime(&ms, begin, end));
      if (i >= kWarmUps) us.push_back(ms * 1e3 / kCallsAGraph);
    }
    check(cudaGraphExecDestroy(graph));
    for (cudaEvent_t event : {fork, join, begin, end}) check(cudaEventDestroy(event));
    return us;
  }

  // On the device already, so that its first launch has nothing to bring there.
  template <class Launch>
  cudaGraphExec_t graph_of(uint32_t rank, const Launch& launch) const {
    DeviceScope scope(placement_.device_of(rank));
    check(cudaStreamBeginCapture(stream(rank), cudaStreamCaptureModeRelaxed));
    for (int i = 0; i < kCallsAGraph; ++i) launch(rank, stream(rank));
    const cudaGraphExec_t graph = end_capture(stream(rank));
    check(cudaGraphUpload(graph, stream(rank)));
    return graph;
  }

  template <class Launch>
  std::vector<double> of_a_graph_a_rank(const Launch& launch) {
    std::vector<cudaGraphExec_t> graphs;
    for (uint32_t r = 0; r < placement_.ranks; ++r) graphs.push_back(graph_of(r, launch));
    synchronize(placement_.gpus);
    queue_all(graphs);
    synchronize(placement_.gpus);
    meeting_->require_no_failure();
    for (uint32_t r = 0; r < placement_.ranks; ++r) {
      DeviceScope scope(placement_.device_of(r));
      check(cudaGraphExecDestroy(graphs[r]));
    }
    std::vector<double> us;
    for (int i = kWarmUps; i < kWarmUps + kReplays; ++i) {
      double slowest = 0;
      for (const auto& rank : ranks_) slowest = std::max(slowest, rank->us(i));
      us.push_back(slowest / kCallsAGraph);
    }
    return us;
  }

  void queue_all(const std::vector<cudaGraphExec_t>& graphs) {
    go_.set(0, 0);
    launch_all([&](uint32_t, cudaStream_t stream) {
      wait_for_host<<<1, 1, 0, stream>>>(go_.at(0));
      check(cudaGetLastError());
    });
    for (int i = 0; i < kWarmUps + kReplays; ++i) {
      launch_all([&](uint32_t r, cudaStream_t stream) {
        meeting_->join(r, stream);
        ranks_[r]->replay(i, graphs[r]);
      });
    }
    // Else the time of the host is in those of the GPUs.
    if (std::any_of(ranks_.begin(), ranks_.end(), [](const auto& r) { return r->has_begun(); }))
      throw std::runtime_error(
          "streams: a host that queues all replays in 50 ms is required; got a slower one; run "
          "fewer ranks, or on a host with less to do");
    go_.set(0, 1);
  }

  Placement placement_;
  HostWords go_;
  std::vector<std::unique_ptr<RankStream>> ranks_;
  std::unique_ptr<Meeting> meeting_;
};

}  // namespace gan::streams
