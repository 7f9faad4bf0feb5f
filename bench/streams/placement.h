// Where the ranks lie: rank r on GPU r % gpus. Host only.
#pragma once
#include <algorithm>
#include <cstdint>
#include <string>

#include "host/plan.h"

namespace gan::streams {

struct Placement {
  uint32_t ranks, gpus;      // gpus: no more than ranks
  uint32_t multiprocessors;  // of a GPU

  int device_of(uint32_t rank) const { return static_cast<int>(rank % gpus); }
  uint32_t ranks_a_gpu() const { return divide_up(ranks, gpus); }
  uint32_t share() const { return multiprocessors / ranks_a_gpu(); }  // of a rank

  // Of one rank a GPU, the words of launcher.py; of one GPU, what report.py looks for.
  std::string words() const {
    const std::string sms = std::to_string(multiprocessors), n = std::to_string(gpus);
    if (gpus == ranks) return n + " GPUs, one rank each";
    if (gpus == 1) return "ranks as streams of one process, " + sms + "/N SMs each";
    return std::to_string(ranks) + " ranks as streams of one process on " + n + " GPUs, " + sms +
           "/" + std::to_string(ranks_a_gpu()) + " SMs each";
  }
};

inline Placement placed(uint32_t ranks, uint32_t gpus, uint32_t multiprocessors) {
  return {ranks, std::min(gpus, ranks), multiprocessors};
}

}  // namespace gan::streams
