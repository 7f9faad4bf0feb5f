// What latency.cuh and bandwidth.cuh share: a GPU with its stream, and its memory.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>
#include <memory>

#include "host/cuda_status.h"

namespace links {
using namespace gan;

inline constexpr uint64_t kTimeoutNs = 5ull * 1000 * 1000 * 1000;  // of each kernel that waits

inline void check(cudaError_t status) {
  check_cuda(status, "links: a CUDA call that works is required");
}

template <class T>
using Memory = std::shared_ptr<T>;

template <class T>
Memory<T> allocate(int device, size_t count) {
  DeviceScope scope(device);
  void* data = nullptr;
  check(cudaMalloc(&data, count * sizeof(T)));
  return {static_cast<T*>(data), [](T* p) { cudaFree(p); }};
}

struct Gpu {
  int device;
  cudaStream_t stream = nullptr;
  cudaEvent_t begin = nullptr, end = nullptr;

  explicit Gpu(int index) : device(index) {
    DeviceScope scope(device);
    check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    for (cudaEvent_t* event : {&begin, &end}) check(cudaEventCreate(event));
  }
  ~Gpu() {
    for (cudaEvent_t event : {begin, end}) cudaEventDestroy(event);
    cudaStreamDestroy(stream);
  }
  Gpu(const Gpu&) = delete;
  Gpu& operator=(const Gpu&) = delete;

  void synchronize() const { check(cudaStreamSynchronize(stream)); }
};

}  // namespace links
