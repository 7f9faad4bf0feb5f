// One-way latency: half of a round trip of one pack, or of a warp's 32, between two GPUs or within
// one.
#pragma once
#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "device/gpu.cuh"
#include "device/pack.cuh"
#include "gpus.h"

namespace links {

constexpr uint32_t kLaunches = 10, kFirstTrips = 20;  // so many trips of a launch are dropped

struct Outcome {
  uint64_t cycles, ns;  // of the same time, by the clock of the SM and by that of the GPU
  uint64_t missing;     // the round trip whose pack did not come in time; 0: all came
};

struct Side {
  const Pack* own;   // polled, in this GPU's memory
  Pack* peer;        // pushed to: the other side's `own`
  uint64_t* cycles;  // of each round trip; of the side that starts
  Outcome* outcome;
};

struct PingPong {
  Side side[2];         // side 0 starts, side 1 answers
  uint32_t first_side;  // of this launch: block b is side first_side + b
  uint32_t packs, trips;
};

// The words of a pack are the number of its round trip, so that a mailbox need not be cleared in
// between. A pack is answered before the next is sent: none is overwritten unread.
__device__ inline void push(Pack* to, uint32_t trip) {
  store_relaxed_sys(to, {trip, trip, trip, trip});
}

// All four words are tested, as in is_full: they arrive in no order. The clock is looked at as
// rarely as in Wait (exchange.cuh).
__device__ inline bool arrives(const Pack* own, uint32_t trip, uint64_t deadline) {
  for (uint32_t polls = 1;; ++polls) {
    const Pack p = load_relaxed_sys(own);  // pairs with the store in push of the other side
    if ((p.x == trip) & (p.y == trip) & (p.z == trip) & (p.w == trip)) return true;
    if (polls % 64 == 0 && clock_ns() > deadline) return false;
  }
}

// A warp. Lane i has pack i; the warp goes on when all its packs are here.
__global__ void ping_pong(GAN_KERNEL_PARAMETER PingPong p) {
  const uint32_t lane = threadIdx.x;
  if (lane >= p.packs) return;
  const bool starts = p.first_side + blockIdx.x == 0;
  const Side side = starts ? p.side[0] : p.side[1];
  const uint64_t deadline = clock_ns() + kTimeoutNs;
  uint64_t first_ns = 0, first_cycles = 0;
  for (uint32_t trip = 1; trip <= p.trips; ++trip) {
    warp_sync();  // the lanes' stores go out as one
    const uint64_t began = clock64();
    if (starts) push(side.peer + lane, trip);
    if (!arrives(side.own + lane, trip, deadline)) {
      side.outcome->missing = trip;
      return;  // the other lanes and the other side end by their deadlines
    }
    warp_sync();
    if (!starts) push(side.peer + lane, trip);
    if (!starts || lane != 0) continue;
    side.cycles[trip - 1] = clock64() - began;
    if (trip == 1) first_ns = clock_ns(), first_cycles = clock64();
  }
  if (!starts || lane != 0) return;
  side.outcome->ns = clock_ns() - first_ns;
  side.outcome->cycles = clock64() - first_cycles;
}

// A ping-pong between two GPUs, or two blocks of one.
class Match {
 public:
  Match(const Gpu& from, const Gpu& to, uint32_t packs, uint32_t trips)
      : gpus_{&from, &to}, cycles_(allocate<uint64_t>(from.device, trips)) {
    for (int s : {0, 1}) {
      mailbox_[s] = allocate<Pack>(gpus_[s]->device, kWarpLanes);
      outcome_[s] = allocate<Outcome>(gpus_[s]->device, 1);
    }
    for (int s : {0, 1})
      play_.side[s] = {mailbox_[s].get(), mailbox_[1 - s].get(), cycles_.get(), outcome_[s].get()};
    play_.packs = packs;
    play_.trips = trips;
  }

  // Nanoseconds, half of each round trip of a launch.
  std::vector<double> half_trips_ns() {
    reset();
    if (gpus_[0] == gpus_[1]) {
      launch(0, 2);  // the GPU is idle: both blocks run at once
    } else {
      launch(0, 1);
      launch(1, 1);
    }
    for (const Gpu* gpu : gpus_) gpu->synchronize();
    const Outcome found = outcome(0);
    if (const uint64_t trip = std::max(found.missing, outcome(1).missing))
      throw std::runtime_error("links: an answer within 5 s is required between GPUs " +
                               std::to_string(gpus_[0]->device) + " and " +
                               std::to_string(gpus_[1]->device) + "; got none in round trip " +
                               std::to_string(trip) +
                               "; leave one of them out with CUDA_VISIBLE_DEVICES");
    std::vector<uint64_t> cycles(play_.trips);
    DeviceScope scope(gpus_[0]->device);
    check(cudaMemcpy(cycles.data(), cycles_.get(), cycles.size() * sizeof(uint64_t),
                     cudaMemcpyDeviceToHost));
    // The GPU's clock may tick too coarsely for one trip: it tells how long a cycle was.
    const double ns_a_cycle = static_cast<double>(found.ns) / found.cycles;
    std::vector<double> ns;
    for (size_t i = kFirstTrips; i < cycles.size(); ++i) ns.push_back(cycles[i] * ns_a_cycle / 2);
    return ns;
  }

 private:
  // On both GPUs, before either begins.
  void reset() {
    static_assert(kEmptyWord == 0xffffffffu, "memset writes its bytes");
    for (int s : {0, 1}) {
      DeviceScope scope(gpus_[s]->device);
      const cudaStream_t stream = gpus_[s]->stream;
      check(cudaMemsetAsync(mailbox_[s].get(), 0xff, kWarpLanes * sizeof(Pack), stream));
      check(cudaMemsetAsync(outcome_[s].get(), 0, sizeof(Outcome), stream));
    }
    for (const Gpu* gpu : gpus_) gpu->synchronize();
  }
  void launch(uint32_t first_side, uint32_t blocks) {
    DeviceScope scope(gpus_[first_side]->device);
    play_.first_side = first_side;
    ping_pong<<<blocks, kWarpLanes, 0, gpus_[first_side]->stream>>>(play_);
    check(cudaGetLastError());
  }
  Outcome outcome(int side) const {
    DeviceScope scope(gpus_[side]->device);
    Outcome found;
    check(cudaMemcpy(&found, outcome_[side].get(), sizeof(found), cudaMemcpyDeviceToHost));
    return found;
  }

  const Gpu* gpus_[2];
  Memory<uint64_t> cycles_;
  Memory<Pack> mailbox_[2];
  Memory<Outcome> outcome_[2];
  PingPong play_{};
};

inline std::vector<double> latencies_ns(const Gpu& from, const Gpu& to, uint32_t packs,
                                        uint32_t trips) {
  Match match(from, to, packs, trips);
  match.half_trips_ns();  // clocks rise, addresses are looked up for the first time
  std::vector<double> all;
  for (uint32_t i = 0; i < kLaunches; ++i) {
    const std::vector<double> ns = match.half_trips_ns();
    all.insert(all.end(), ns.begin(), ns.end());
  }
  return all;
}

}  // namespace links
