// The ranks, what they have, and what can be measured of them.
#pragma once
#include <cuda_runtime.h>

#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "harness/quantiles.h"
#include "inboxes.cuh"
#include "memory.cuh"
#include "placement.h"
#include "timing.cuh"

namespace gan::streams {

enum class Form { kPlain, kResidual, kSandwich };

inline Form form_of(const std::string& name) {
  if (name == "plain") return Form::kPlain;
  if (name == "residual") return Form::kResidual;
  if (name == "sandwich") return Form::kSandwich;
  throw std::runtime_error("--form: plain, residual or sandwich is required; got " + name);
}

static __global__ void copy(const uint4* from, uint4* to, size_t count) {
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < count;
       i += size_t{gridDim.x} * blockDim.x)
    to[i] = from[i];
}

class World {
 public:
  World(const Placement& placement, Form form, uint32_t hidden, uint32_t max_rows)
      : placement_(placement),
        form_(form),
        hidden_(hidden),
        inboxes_(placement, max_rows, hidden),
        timing_(placement) {
    for (uint32_t device = 0; device < placement.gpus; ++device)
      weights_.push_back(std::make_unique<Weights>(static_cast<int>(device), hidden));
    for (uint32_t r = 0; r < placement.ranks; ++r) {
      data_.push_back(
          std::make_unique<RankData>(placement.device_of(r), r, size_t{max_rows} * hidden));
    }
    synchronize(placement.gpus);
  }

  // What a rank reads and writes in a second while all ranks copy, each with blocks for its share.
  double copy_gb_s() {
    // More than an L2 has: by two ranks together, or by one alone.
    const size_t bytes = (placement_.gpus == 1 ? 64 : 256) << 20;
    constexpr uint32_t kThreads = 512, kBlocksAMultiprocessor = 2048 / kThreads;
    std::vector<std::unique_ptr<Array>> from, to;
    for (uint32_t r = 0; r < placement_.ranks; ++r) {
      const int device = placement_.device_of(r);
      from.push_back(std::make_unique<Array>(device, bytes / sizeof(Element), r, 1.0f));
      to.push_back(std::make_unique<Array>(device, bytes / sizeof(Element), r, 0.0f));
    }
    synchronize(placement_.gpus);
    const double us = median(timing_.us([&](uint32_t r, cudaStream_t stream) {
      copy<<<placement_.share() * kBlocksAMultiprocessor, kThreads, 0, stream>>>(
          reinterpret_cast<const uint4*>(from[r]->data()), reinterpret_cast<uint4*>(to[r]->data()),
          bytes / sizeof(uint4));
      check(cudaGetLastError());
    }));
    return 2.0 * bytes / us / 1e3;
  }

  // The epilogue alone, in a rank's share of the SMs. Microseconds a call, of each replay.
  std::vector<double> floor_us(uint32_t rows, const PlanRule& rule) {
    poison_outputs();
    return timing_.us([&](uint32_t r, cudaStream_t stream) {
      LocalNormParams params{call(r, rows), rule.trigger};
      const LaunchShape shape = shape_of(rule, rows, params.row.row_packs);
      params.row.packs_a_thread = shape.packs_a_thread;
      check(launch_local_norm(DType::kBFloat16, params, shape, stream),
            "streams: a local kernel that starts is required");
    });
  }

  std::vector<double> fused_us(uint32_t rows, const PlanRule& rule) {
    poison_outputs();
    const std::vector<double> us = timing_.us(
        [&](uint32_t r, cudaStream_t stream) { inboxes_.launch(r, call(r, rows), rule, stream); });
    inboxes_.require_no_failure();
    return us;
  }

  // Of the last calls, each rank's norm_out and residual_out.
  std::vector<std::vector<char>> outputs(uint32_t rows) const {
    const size_t count = size_t{rows} * hidden_;
    std::vector<std::vector<char>> of_ranks;
    for (const auto& d : data_) {
      std::vector<char> both = d->norm_out.bytes(count);
      const std::vector<char> residual_out = d->residual_out.bytes(count);
      both.insert(both.end(), residual_out.begin(), residual_out.end());
      of_ranks.push_back(std::move(both));
    }
    return of_ranks;
  }

 private:
  void poison_outputs() {
    for (auto& d : data_) {
      d->norm_out.poison();
      d->residual_out.poison();
    }
    synchronize(placement_.gpus);
  }

  RowParams call(uint32_t r, uint32_t rows) const {
    const RankData& data = *data_[r];
    const Weights& weights = *weights_[placement_.device_of(r)];
    RowParams row = row_params(data, weights.weight, rows, hidden_);
    if (form_ != Form::kPlain) row.residual = data.residual.data();
    if (form_ == Form::kSandwich) row.post_weight = weights.post_weight.data();
    return row;
  }

  Placement placement_;
  Form form_;
  uint32_t hidden_;
  std::vector<std::unique_ptr<Weights>> weights_;  // by device
  std::vector<std::unique_ptr<RankData>> data_;
  Inboxes inboxes_;
  Timing timing_;
};

}  // namespace gan::streams
