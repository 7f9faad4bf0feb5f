// The links between this machine's GPUs as the product uses them: one process, stores into another
// GPU's memory, polls of one's own, by the product's own instructions. No torch, no Python.
//
//   links [--round-trips 500] [--sizes 4096,65536,1048576,16777216,67108864]
//
// Latency: of each pair of GPUs, and of each GPU with itself, half of a round trip of one pack of
// 16 bytes, and of a warp's 32. Bandwidth: GB/s that a GPU pushes, for each of --sizes (bytes): one
// pair alone, a ring (each GPU to the next), and all to all; a GPU that is alone to itself. Pairs
// that do not reach each other are left out. Peers: what the driver says of each pair.
//
// It prints a JSON object a line; run.py makes the report of them (bench/README.md has the schema).
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "bandwidth.cuh"
#include "gpus.h"
#include "harness/quantiles.h"
#include "host/workspace.h"
#include "latency.cuh"

using namespace links;

namespace {

// ---- the machine ----

struct Peer {
  int from, to, access = 0, native_atomics = 0, performance_rank = 0;
};

class Machine {
 public:
  Machine() {
    int found = 0;
    check_cuda(cudaGetDeviceCount(&found), "links: a CUDA GPU is required");
    const int count = std::min(found, static_cast<int>(kMaxRanks));
    for (int i = 0; i < count; ++i) gpus_.push_back(std::make_unique<Gpu>(i));
    for (int from = 0; from < count; ++from) {
      for (int to = 0; to < count; ++to) {
        if (from != to) peers_.push_back(connect(from, to));
      }
    }
    for (const auto& gpu : gpus_) preload(*gpu);
  }

  int count() const { return static_cast<int>(gpus_.size()); }
  const Gpu& gpu(int i) const { return *gpus_[i]; }
  const std::vector<Peer>& peers() const { return peers_; }

  // In both directions.
  bool connected(int a, int b) const {
    return std::all_of(peers_.begin(), peers_.end(), [&](const Peer& p) {
      return p.access != 0 || std::minmax(p.from, p.to) != std::minmax(a, b);
    });
  }
  bool all_connected() const {
    return std::all_of(peers_.begin(), peers_.end(), [](const Peer& p) { return p.access != 0; });
  }

 private:
  static Peer connect(int from, int to) {
    Peer peer{from, to};
    const auto ask = [&](int* answer, cudaDeviceP2PAttr attribute) {
      check(cudaDeviceGetP2PAttribute(answer, attribute, from, to));
    };
    ask(&peer.access, cudaDevP2PAttrAccessSupported);
    ask(&peer.native_atomics, cudaDevP2PAttrNativeAtomicSupported);
    ask(&peer.performance_rank, cudaDevP2PAttrPerformanceRank);
    if (peer.access != 0) {
      DeviceScope scope(from);
      check(cudaDeviceEnablePeerAccess(to, 0));
    }
    return peer;
  }

  // Launches of all kernels with nothing to do. A kernel's first launch on a GPU loads it, which
  // may wait for running kernels, and those may be waiting for that launch.
  static void preload(const Gpu& gpu) {
    DeviceScope scope(gpu.device);
    ping_pong<<<1, kWarpLanes, 0, gpu.stream>>>(PingPong{});
    push_packs<<<1, kPushThreads, 0, gpu.stream>>>(Targets{}, 0);
    check(cudaGetLastError());
    Gate gate;
    gate.hold(gpu.stream);
    gate.open();
    gpu.synchronize();
  }

  std::vector<std::unique_ptr<Gpu>> gpus_;
  std::vector<Peer> peers_;
};

// ---- the command line ----

struct Options {
  uint32_t round_trips = 500;
  std::vector<uint64_t> sizes{4 << 10, 64 << 10, 1 << 20, 16 << 20, 64 << 20};
};

uint64_t number_of(const std::string& name, const std::string& text, uint64_t least,
                   uint64_t most) {
  const bool digits = !text.empty() && text.find_first_not_of("0123456789") == std::string::npos;
  const uint64_t number = digits && text.size() < 19 ? std::stoull(text) : 0;
  if (number < least || number > most)
    throw std::runtime_error(name + ": a number from " + std::to_string(least) + " to " +
                             std::to_string(most) + " is required; got '" + text + "'");
  return number;
}

std::vector<uint64_t> sizes_of(const std::string& text) {
  std::vector<uint64_t> sizes;
  std::stringstream stream(text);
  for (std::string item; std::getline(stream, item, ',');) {
    sizes.push_back(number_of("--sizes", item, sizeof(Pack), uint64_t{1} << 30));
    if (sizes.back() % sizeof(Pack) != 0)
      throw std::runtime_error("--sizes: multiples of 16 bytes are required; got " + item);
  }
  if (sizes.empty()) throw std::runtime_error("--sizes: a size is required; got none");
  return sizes;
}

Options parse(int argc, char** argv) {
  Options o;
  for (int i = 1; i < argc; i += 2) {
    const std::string name = argv[i];
    if (i + 1 == argc) throw std::runtime_error(name + ": a value is required; got none");
    const std::string value = argv[i + 1];
    if (name == "--round-trips") {
      o.round_trips = number_of(name, value, 100, 100000);
    } else if (name == "--sizes") {
      o.sizes = sizes_of(value);
    } else {
      throw std::runtime_error(name + ": no such option; see the top of links.cu");
    }
  }
  return o;
}

// ---- what is measured ----

void print_machine(const Machine& machine, const Options& o) {
  std::string names;  // of unlike GPUs, each kind once
  for (int i = 0; i < machine.count(); ++i) {
    const std::string name = device_info(i).name;
    if (names.find(name) == std::string::npos) names += (names.empty() ? "" : ", ") + name;
  }
  std::printf(
      "{\"gpu\": \"%s\", \"gpus\": %d, \"round_trips\": %u, "
      "\"versions\": {\"gemma_ar_norm\": \"%s\", \"cuda\": \"%s\"}}\n",
      names.c_str(), machine.count(), o.round_trips, GAN_VERSION, driver_status().c_str());
  for (const Peer& p : machine.peers()) {
    std::printf(
        "{\"peer\": {\"from\": %d, \"to\": %d, \"access\": %d, \"native_atomics\": %d, "
        "\"performance_rank\": %d}}\n",
        p.from, p.to, p.access, p.native_atomics, p.performance_rank);
  }
}

void measure_latency(const Machine& machine, const Options& o) {
  for (int from = 0; from < machine.count(); ++from) {
    for (int to = 0; to < machine.count(); ++to) {
      if (!machine.connected(from, to)) continue;
      for (const uint32_t packs : {1u, kWarpLanes}) {
        const std::vector<double> ns =
            latencies_ns(machine.gpu(from), machine.gpu(to), packs, o.round_trips);
        std::printf(
            "{\"latency_ns\": {\"from\": %d, \"to\": %d, \"packs\": %u, \"ns\": %.1f, "
            "\"p10\": %.1f, \"p90\": %.1f}}\n",
            from, to, packs, median(ns), quantile(ns, 0.1), quantile(ns, 0.9));
      }
    }
  }
}

class Bandwidth {
 public:
  Bandwidth(const Machine& machine, const Options& o)
      : machine_(machine),
        count_(machine.count()),
        sizes_(o.sizes),
        area_packs_(*std::max_element(sizes_.begin(), sizes_.end()) / sizeof(Pack)) {
    for (int i = 0; i < count_; ++i) inboxes_.push_back(allocate<Pack>(i, count_ * area_packs_));
  }

  void measure() {
    for (int from = 0; from < count_; ++from) {
      for (int distance = count_ == 1 ? 0 : 1; distance < count_; ++distance) {
        const int to = (from + distance) % count_;
        if (!machine_.connected(from, to)) continue;
        print("pair", std::to_string(from), std::to_string(to), {sender(from, distance, 1)});
      }
    }
    if (count_ == 1 || !machine_.all_connected()) return;
    print("ring", "null", "null", all_senders(1));
    print("all", "null", "null", all_senders(count_ - 1));
  }

 private:
  // Pushes into its own areas in so many GPUs, from the one `distance` further on.
  Sender sender(int from, int distance, uint32_t targets) const {
    Sender s{&machine_.gpu(from), {}};
    for (uint32_t t = 0; t < targets; ++t) {
      const int to = (from + distance + t) % count_;
      s.to.at[t] = inboxes_[to].get() + from * area_packs_;
    }
    s.to.count = targets;
    return s;
  }
  std::vector<Sender> all_senders(uint32_t targets) const {
    std::vector<Sender> senders;
    for (int from = 0; from < count_; ++from) senders.push_back(sender(from, 1, targets));
    return senders;
  }

  void print(const char* pattern, const std::string& from, const std::string& to,
             const std::vector<Sender>& senders) {
    for (const uint64_t bytes : sizes_) {
      const Speed speed = speed_of(senders, bytes, gate_);
      std::printf(
          "{\"bandwidth\": {\"pattern\": \"%s\", \"from\": %s, \"to\": %s, \"bytes\": %llu, "
          "\"blocks\": %u, \"gb_s\": %.2f}}\n",
          pattern, from.c_str(), to.c_str(), static_cast<unsigned long long>(bytes), speed.blocks,
          speed.gb_s);
    }
  }

  const Machine& machine_;
  const int count_;
  const std::vector<uint64_t> sizes_;
  const uint64_t area_packs_;  // in each GPU there is an area for what comes from each
  std::vector<Memory<Pack>> inboxes_;
  Gate gate_;
};

void run(const Options& o) {
  const Machine machine;
  print_machine(machine, o);
  measure_latency(machine, o);
  Bandwidth(machine, o).measure();
}

}  // namespace

int main(int argc, char** argv) {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);  // of a run that is stopped, what it had is left
  try {
    run(parse(argc, argv));
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return 0;
}
