// Every kernel of the product, with the blocks of all ranks in one launch: blockIdx.y is the rank.
// For tools that run kernels one after another, as compute-sanitizer may: there a rank's launch
// would wait for ever for its peers'. tests/sanitizer/run.py builds it and runs it under the tools.
//
//   one_launch [quick|usual|full] [SEED] [any|alone|clusters]
//
// The last is which teams: of 1, 2 and 4 blocks in turn, of one block, or of 2 and 4.
//
// The program checks itself: every output of every rank against the contract, bit for bit, every
// inbox, and at the end that no kernel of the table was left out. It ends with 1 where something is
// wrong, and else its last line begins with "right:".
#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>
#include <new>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include "device/debug_mode.cuh"
#include "host/cuda_status.h"
#include "host/exchange_setup.h"
#include "runner.h"
#include "table.h"

using namespace gan;
using namespace gan::testing;

namespace {

void check(cudaError_t status, const char* what) {
  check_cuda(status, std::string(what) + ": a CUDA call that works is required");
}

class Gpu : public Device {
 public:
  uint8_t* allocate(uint64_t bytes) override {
    void* memory = nullptr;
    check(cudaMalloc(&memory, bytes), "allocate");
    return static_cast<uint8_t*>(memory);
  }
  void free(uint8_t* memory) override { cudaFree(memory); }
  uint64_t* allocate_host_word() override {
    void* memory = nullptr;
    check(cudaHostAlloc(&memory, sizeof(uint64_t), cudaHostAllocPortable | cudaHostAllocMapped),
          "host word");
    *static_cast<uint64_t*>(memory) = 0;
    return static_cast<uint64_t*>(memory);
  }
  void free_host_word(uint64_t* word) override { cudaFreeHost(word); }
  void fill(uint8_t* to, uint8_t byte, uint64_t bytes) override {
    check(cudaMemset(to, byte, bytes), "fill");
  }
  void upload(uint8_t* to, const uint8_t* from, uint64_t bytes) override {
    check(cudaMemcpy(to, from, bytes, cudaMemcpyHostToDevice), "upload");
  }
  void download(uint8_t* to, const uint8_t* from, uint64_t bytes) override {
    check(cudaMemcpy(to, from, bytes, cudaMemcpyDeviceToHost), "download");
  }

  void launch(const OneLaunch& launch) override {
    const RowParams& row = launch.of[0].row;  // what decides is alike
    if (!is_possible(launch.shape, row))
      throw std::logic_error("launch: a possible one is required");
    with_kernel(launch.dtype, launch.ranks, launch.algorithm, launch.shape.packs_a_thread == 1,
                form_of(row), [&](auto kernel) { launch_all(kernel, launch); });
    check(cudaDeviceSynchronize(), "launch");
    ++launches_;
  }

  bool has_clusters() const {
    int major = 0;
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0), "device");
    return major >= 9;
  }
  uint32_t launches() const { return launches_; }
  const std::set<const void*>& kernels() const { return kernels_; }

 private:
  void launch_all(void (*kernel)(FusedParams), const OneLaunch& launch) {
    FusedParams params{};
    params.trigger = launch.shape.trigger;
    for (size_t i = 0; i < launch.of.size(); ++i) {
      params.row.of[i] = launch.of[i].row;
      params.exchange.of[i] = launch.of[i].exchange;
      params.two_shot.of[i] = launch.of[i].two_shot;
    }
    start(kernel, params, launch);
  }
  void launch_all(void (*kernel)(LocalNormParams), const OneLaunch& launch) {
    LocalNormParams params{};
    params.trigger = launch.shape.trigger;
    for (size_t i = 0; i < launch.of.size(); ++i) params.row.of[i] = launch.of[i].row;
    start(kernel, params, launch);
  }

  // As launch.cu does, but for the ranks in y, and without an early start: there is nothing that
  // could.
  template <class Params>
  void start(void (*kernel)(Params), const Params& params, const OneLaunch& launch) {
    const LaunchShape& shape = launch.shape;
    cudaLaunchAttribute cluster{};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {shape.blocks_a_team, 1, 1};
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(shape.blocks(), static_cast<uint32_t>(launch.of.size()));
    config.blockDim = shape.threads;
    config.dynamicSmemBytes = dynamic_shared_bytes(shape);
    config.attrs = &cluster;
    config.numAttrs = shape.blocks_a_team > 1 ? 1 : 0;
    check_that_all_fit(kernel, config, shape.blocks_a_team);
    check(cudaLaunchKernelEx(&config, kernel, params), "launch");
    kernels_.insert(reinterpret_cast<const void*>(kernel));
  }

  // Blocks wait for each other, so all must run at once.
  template <class Params>
  void check_that_all_fit(void (*kernel)(Params), const cudaLaunchConfig_t& config,
                          uint32_t cluster_blocks) {
    const uint32_t blocks = config.gridDim.x * config.gridDim.y;
    int fit = 0;
    if (cluster_blocks > 1) {
      check(cudaOccupancyMaxActiveClusters(&fit, kernel, &config), "occupancy");
      fit *= static_cast<int>(cluster_blocks);
    } else {
      int multiprocessors = 0;
      check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, 0),
            "multiprocessors");
      check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(
                &fit, kernel, static_cast<int>(config.blockDim.x), config.dynamicSmemBytes),
            "occupancy");
      fit *= multiprocessors;
    }
    if (static_cast<uint32_t>(fit) >= blocks) return;
    throw std::runtime_error("launch: a GPU that runs all " + std::to_string(blocks) +
                             " blocks at once is required; it runs " + std::to_string(fit));
  }

  std::set<const void*> kernels_;  // that have run
  uint32_t launches_ = 0;
};

// The two kernels of debug mode, by two ranks: calls that are alike, one within another, calls that
// differ, and a rank that does not come.
class DebugKernels {
 public:
  explicit DebugKernels(Gpu& gpu) : gpu_(gpu) {
    const uint64_t bytes = inbox_bytes(kRanks, 1, 1, kPackBytes);
    for (uint32_t rank = 0; rank < kRanks; ++rank) {
      inboxes_.push_back(gpu.allocate(bytes));
      gpu.fill(inboxes_[rank], 0, kHeaderBytes);
      failures_.push_back(gpu.allocate_host_word());
      void* report = nullptr;
      check(cudaHostAlloc(&report, sizeof(DebugReport), cudaHostAllocMapped), "report");
      reports_.push_back(new (report) DebugReport{});
    }
    constexpr uint32_t kTicks = 60'000;  // a minute
    for (uint32_t rank = 0; rank < kRanks; ++rank) {
      params_.exchange.of[rank] =
          exchange_params(InboxLayout::of(kRanks, bytes), rank, inboxes_, kTicks, failures_[rank]);
      params_.report.of[rank] = reports_[rank];
      for (uint32_t f = 0; f < kCallFields; ++f) params_.call.of[rank].at[f] = 100 + f;
    }
  }
  ~DebugKernels() {
    for (uint32_t rank = 0; rank < kRanks; ++rank) {
      gpu_.free(inboxes_[rank]);
      gpu_.free_host_word(failures_[rank]);
      cudaFreeHost(reports_[rank]);
    }
  }

  // Each for a new object. Empty, or what is wrong.
  std::string overlap() {
    enter(kRanks);
    if (!all({1, 0, 0, 0})) return "enter_call: alike and alone, it found something";
    enter(kRanks);
    if (!all({2, 1, 0, 1})) return "enter_call: it did not find the call before it";
    leave();
    leave();
    return all({0, 1, 0, 1}) ? "" : "leave_call: calls are left";
  }
  std::string differ() {
    ++params_.call.of[1].at[kFieldEps];
    enter(kRanks);
    if (!all({1, 0, 1, 1})) return "enter_call: it did not find calls that differ";
    for (uint32_t rank = 0; rank < kRanks; ++rank) {
      for (uint32_t f = 0; f < kCallFields; ++f) {
        for (uint32_t r = 0; r < kRanks; ++r) {
          if (static_cast<uint32_t>(reports_[rank]->calls[r][f]) != params_.call.of[r].at[f])
            return "enter_call: its report has other calls";
        }
      }
    }
    return "";
  }
  std::string absent() {
    params_.exchange.of[0].timeout_ticks = 250;
    enter(1);  // of the two ranks the first alone
    const FailureRecord record = FailureRecord::of(*failures_[0]);
    if (*failures_[0] == 0 || record.peer != 1) return "enter_call: the absent rank is not named";
    return "";
  }

 private:
  static constexpr uint32_t kRanks = 2;
  struct State {
    uint32_t in_use;
    uint64_t overlap, differs;
    uint32_t failed;
  };

  void enter(uint32_t ranks) {
    enter_call<<<dim3(1, ranks), kRanks * kCallFields>>>(params_);
    check(cudaDeviceSynchronize(), "enter_call");
  }
  void leave() {
    for (uint8_t* inbox : inboxes_) leave_call<<<1, 1>>>(inbox);
    check(cudaDeviceSynchronize(), "leave_call");
  }
  bool all(const State& expected) {
    for (uint32_t rank = 0; rank < kRanks; ++rank) {
      InboxHeader header;
      gpu_.download(reinterpret_cast<uint8_t*>(&header), inboxes_[rank], sizeof(header));
      const DebugReport& report = *reports_[rank];
      if (header.in_use != expected.in_use || report.overlap != expected.overlap ||
          report.differs != expected.differs || header.call[0].failed != expected.failed ||
          *failures_[rank] != 0)
        return false;
    }
    return true;
  }

  Gpu& gpu_;
  std::vector<uint8_t*> inboxes_;
  std::vector<uint64_t*> failures_;
  std::vector<DebugReport*> reports_;
  DebugParams params_{};
};

// The case itself stays; every kernel does with any team.
void choose_team(Case& c, const std::string& teams, bool has_clusters) {
  if (teams != "any" && teams != "alone" && teams != "clusters")
    throw std::runtime_error("teams: any, alone or clusters is required; got " + teams);
  if (teams == "alone" || !has_clusters) {
    c.blocks_a_team = 1;
  } else if (teams == "clusters" && c.blocks_a_team == 1) {
    c.blocks_a_team = c.ranks % 2 == 0 ? 2 : 4;
  }
}

Extent extent_of(const std::string& name) {
  if (name == "quick") return Extent::kQuick;
  if (name == "usual") return Extent::kUsual;
  if (name == "full") return Extent::kFull;
  throw std::runtime_error("extent: quick, usual or full is required; got " + name);
}

int run(int argc, char** argv) {
  const Extent extent = extent_of(argc > 1 ? argv[1] : "usual");
  uint64_t seed = argc > 2 ? std::stoull(argv[2]) : 1;
  const std::string teams = argc > 3 ? argv[3] : "any";
  Gpu gpu;
  std::vector<Case> cases = matrix(extent);
  for (Case& c : cases) {
    choose_team(c, teams, gpu.has_clusters());
    const std::string wrong = run_case(gpu, c, seed);
    if (!wrong.empty()) {
      std::printf("wrong: %s, seed %llu: %s\n", describe(c).c_str(),
                  static_cast<unsigned long long>(seed), wrong.c_str());
      return 1;
    }
    ++seed;
  }
  for (const std::string& wrong :
       {DebugKernels(gpu).overlap(), DebugKernels(gpu).differ(), DebugKernels(gpu).absent()}) {
    if (wrong.empty()) continue;
    std::printf("wrong: %s\n", wrong.c_str());
    return 1;
  }
  const std::set<const void*> all = all_kernels();
  if (gpu.kernels() != all) {
    std::printf("wrong: %zu kernels of the table have run, of %zu\n", gpu.kernels().size(),
                all.size());
    return 1;
  }
  std::printf("right: %zu cases, %u launches, all %zu kernels of the table and 2 of debug mode\n",
              cases.size(), gpu.launches(), all.size());
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return run(argc, argv);
  } catch (const std::exception& error) {
    std::printf("wrong: %s\n", error.what());
    return 1;
  }
}
