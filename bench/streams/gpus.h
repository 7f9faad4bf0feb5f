// The GPUs of a run: 0 to gpus - 1, all alike, each with access to the others. Host only.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "host/cuda_status.h"
#include "host/workspace.h"

namespace gan::streams {

inline void check(cudaError_t status,
                  const char* what = "streams: a CUDA call that works is required") {
  check_cuda(status, what);
}

// Of what is being destroyed: without an exception, which would hide the one before it.
template <class Free>
void free_on(int device, Free free) noexcept {
  int before = 0;
  cudaGetDevice(&before);
  cudaSetDevice(device);
  free();
  cudaSetDevice(before);
}

inline void synchronize(uint32_t gpus) {
  for (uint32_t device = 0; device < gpus; ++device) {
    DeviceScope scope(static_cast<int>(device));
    check(cudaDeviceSynchronize(), "streams: GPUs that end their work are required");
  }
}

// The memory of each GPU, what is allocated later too, can be reached from all others.
inline void reach_each_other(const std::vector<DeviceInfo>& gpus) {
  const int count = static_cast<int>(gpus.size());
  for (int from = 0; from < count; ++from) {
    for (int to = 0; to < count; ++to) {
      if (to == from) continue;
      const std::string reason = peer_access(from, gpus[to].uuid);
      if (!reason.empty()) {
        throw std::runtime_error("--gpus: GPUs that reach each other are required; got " +
                                 std::to_string(from) + " to " + std::to_string(to) + ": " +
                                 reason);
      }
      DeviceScope scope(from);
      const cudaError_t status = cudaDeviceEnablePeerAccess(to, 0);
      if (status != cudaErrorPeerAccessAlreadyEnabled)
        check(status, "--gpus: peer access is required");
      cudaGetLastError();  // that it was enabled already is no error
    }
  }
}

// What the GPUs are that a run uses; the first one's, since all are alike.
inline DeviceInfo open_gpus(uint32_t count) {
  int visible = 0;
  check(cudaGetDeviceCount(&visible), "streams: a CUDA driver is required");
  if (count > static_cast<uint32_t>(visible)) {
    throw std::runtime_error("--gpus: no more than are visible is required; got " +
                             std::to_string(count) + " of " + std::to_string(visible));
  }
  std::vector<DeviceInfo> gpus;
  for (uint32_t device = 0; device < count; ++device) {
    gpus.push_back(device_info(static_cast<int>(device)));
    const DeviceInfo& first = gpus.front();
    const DeviceInfo& last = gpus.back();
    if (last.name != first.name || last.multiprocessors != first.multiprocessors) {
      throw std::runtime_error("--gpus: GPUs of one kind are required; got " + first.name +
                               " and " + last.name);
    }
  }
  reach_each_other(gpus);
  return gpus.front();
}

}  // namespace gan::streams
