// Bandwidth of pushes, of one GPU or of several that start together.
#pragma once
#include <algorithm>
#include <memory>
#include <stdexcept>
#include <vector>

#include "device/gpu.cuh"
#include "device/pack.cuh"
#include "gpus.h"
#include "harness/quantiles.h"

namespace links {

constexpr int kPushesAGraph = 20, kReplays = 7;
constexpr uint32_t kPushThreads = 512, kPushBlocks[] = {16, 32, 66, 132};

struct Targets {
  Pack* at[kMaxRanks - 1];
  uint32_t count;
};

// Each pack to every target in turn, as push_to_all does (exchange.cuh).
__global__ void __launch_bounds__(kPushThreads)
    push_packs(GAN_KERNEL_PARAMETER Targets to, uint64_t packs) {
  const Pack out{blockIdx.x, threadIdx.x, 1, 2};
  for (uint64_t i = blockIdx.x * uint64_t{kPushThreads} + threadIdx.x; i < packs;
       i += uint64_t{gridDim.x} * kPushThreads) {
#pragma unroll
    for (uint32_t t = 0; t < kMaxRanks - 1; ++t) {
      if (t < to.count) store_relaxed_sys(to.at[t] + i, out);
    }
  }
}

__global__ void wait_at_gate(const uint64_t* gate, uint64_t number, uint64_t* late) {
  const uint64_t deadline = clock_ns() + kTimeoutNs;
  while (load_relaxed_sys(gate) < number) {  // pairs with the store in Gate::open
    if (clock_ns() <= deadline) continue;
    store_relaxed_sys(late, number);
    return;
  }
}

// Holds GPUs until the host has queued the work of all: they start together, and what the host
// takes is in no time. In pinned memory, which every GPU reads.
class Gate {
 public:
  Gate() {
    void* words = nullptr;
    check(cudaHostAlloc(&words, 2 * sizeof(uint64_t), cudaHostAllocPortable));
    words_ = static_cast<uint64_t*>(words);
    words_[0] = words_[1] = 0;
  }
  ~Gate() { cudaFreeHost(words_); }
  Gate(const Gate&) = delete;
  Gate& operator=(const Gate&) = delete;

  // On the current device.
  void hold(cudaStream_t stream) const {
    wait_at_gate<<<1, 1, 0, stream>>>(words_, opened_ + 1, words_ + 1);
    check(cudaGetLastError());
  }
  void open() { __atomic_store_n(words_, ++opened_, __ATOMIC_RELEASE); }
  bool was_late() const { return __atomic_load_n(words_ + 1, __ATOMIC_ACQUIRE) != 0; }

 private:
  uint64_t* words_;  // how often it was opened; not 0: a GPU did not wait for that
  uint64_t opened_ = 0;
};

struct Sender {
  const Gpu* gpu;
  Targets to;
};

using Graph = std::shared_ptr<CUgraphExec_st>;

inline Graph graph_of_pushes(const Sender& sender, uint64_t bytes, uint32_t blocks) {
  DeviceScope scope(sender.gpu->device);
  const cudaStream_t stream = sender.gpu->stream;
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  for (int i = 0; i < kPushesAGraph; ++i)
    push_packs<<<blocks, kPushThreads, 0, stream>>>(sender.to, bytes / sizeof(Pack));
  check(cudaGetLastError());
  cudaGraph_t graph;
  check(cudaStreamEndCapture(stream, &graph));
  cudaGraphExec_t executable;
  check(cudaGraphInstantiate(&executable, graph, 0));
  check(cudaGraphDestroy(graph));
  return {executable, [](cudaGraphExec_t e) { cudaGraphExecDestroy(e); }};
}

inline double elapsed_us(const Gpu& gpu) {
  DeviceScope scope(gpu.device);
  check(cudaEventSynchronize(gpu.end));
  float ms = 0;
  check(cudaEventElapsedTime(&ms, gpu.begin, gpu.end));
  return ms * 1e3;
}

// Microseconds of the slowest sender. A GPU's events are its own: no two GPUs' are compared.
inline double replay_us(const std::vector<Sender>& senders, const std::vector<Graph>& graphs,
                        Gate& gate) {
  for (size_t i = 0; i < senders.size(); ++i) {
    const Gpu& gpu = *senders[i].gpu;
    DeviceScope scope(gpu.device);
    gate.hold(gpu.stream);
    check(cudaEventRecord(gpu.begin, gpu.stream));
    check(cudaGraphLaunch(graphs[i].get(), gpu.stream));
    check(cudaEventRecord(gpu.end, gpu.stream));
  }
  gate.open();
  double slowest = 0;
  for (const Sender& sender : senders) slowest = std::max(slowest, elapsed_us(*sender.gpu));
  if (gate.was_late())
    throw std::runtime_error(
        "links: work queued on all GPUs within 5 s is required; got less; run it again, on a host "
        "with less to do");
  return slowest;
}

struct Speed {
  double gb_s = 0;  // of each sender, to all its targets together
  uint32_t blocks = 0;
};

// Of the best grid. Stores are posted: a thread goes on before its bytes are in the other GPU's
// memory. But a kernel completes, and the graph's next begins, only when all its stores have been
// performed, so the time of the graph is that of the bytes. 20 launches of a few us are in it: of
// small sizes, they are most of it.
inline Speed speed_of(const std::vector<Sender>& senders, uint64_t bytes, Gate& gate) {
  Speed best;
  for (const uint32_t blocks : kPushBlocks) {
    std::vector<Graph> graphs;
    for (const Sender& sender : senders) graphs.push_back(graph_of_pushes(sender, bytes, blocks));
    // First without the gate: nothing of a graph is left to be loaded while GPUs wait.
    for (size_t i = 0; i < senders.size(); ++i) {
      DeviceScope scope(senders[i].gpu->device);
      check(cudaGraphLaunch(graphs[i].get(), senders[i].gpu->stream));
    }
    for (const Sender& sender : senders) sender.gpu->synchronize();
    std::vector<double> us;
    for (int i = 0; i < kReplays; ++i) us.push_back(replay_us(senders, graphs, gate));
    const double sent = static_cast<double>(bytes) * senders[0].to.count * kPushesAGraph;
    const double gb_s = sent / median(us) / 1e3;
    if (gb_s > best.gb_s) best = {gb_s, blocks};
  }
  return best;
}

}  // namespace links
