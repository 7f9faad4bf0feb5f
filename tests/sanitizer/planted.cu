// A bug for each tool to find, so that a tool that finds nothing elsewhere is known to look.
//
//   planted memcheck|initcheck|racecheck|synccheck
#include <cuda_runtime.h>

#include <cstdio>
#include <cstring>

namespace {

constexpr unsigned kThreads = 64;
__device__ unsigned kept;

__global__ void write_beyond(unsigned* data) { data[threadIdx.x + 1] = threadIdx.x; }

__global__ void read_before_written(const unsigned* data) {
  if (data[threadIdx.x] == 12345) kept = threadIdx.x;
}

// The warps do not wait for each other.
__global__ void exchange_without_barrier(unsigned* data) {
  __shared__ unsigned shared[kThreads];
  shared[threadIdx.x] = threadIdx.x;
  data[threadIdx.x] = shared[kThreads - 1 - threadIdx.x];
}

// Not all threads of a warp come to the second barrier. The others stay for a while: those that
// have ended do not count as missing.
__global__ void barrier_for_some(unsigned* data, unsigned count) {
  __shared__ unsigned shared[kThreads];
  shared[threadIdx.x] = 0;
  __syncthreads();
  if (threadIdx.x < count) {
    shared[threadIdx.x] = data[threadIdx.x];
    __syncthreads();
    data[threadIdx.x] = shared[count - 1 - threadIdx.x];
  } else {
    for (const long long start = clock64(); clock64() - start < 100'000'000;) continue;
  }
}

// A barrier that was never initialised.
__global__ void arrive_at_nothing(unsigned* data) {
  __shared__ unsigned long long barrier;
  const auto address = static_cast<unsigned>(__cvta_generic_to_shared(&barrier));
  barrier = 0;
  __syncthreads();
  unsigned long long state = 0;
  asm volatile("mbarrier.arrive.shared::cta.b64 %0, [%1];" : "=l"(state) : "r"(address) : "memory");
  data[threadIdx.x] = static_cast<unsigned>(state);
}

}  // namespace

int main(int argc, char** argv) {
  const char* tool = argc > 1 ? argv[1] : "";
  unsigned* data = nullptr;
  if (cudaMalloc(&data, kThreads * sizeof(unsigned)) != cudaSuccess) return 2;
  if (std::strcmp(tool, "memcheck") == 0) {
    write_beyond<<<1, kThreads>>>(data);
  } else if (std::strcmp(tool, "initcheck") == 0) {
    read_before_written<<<1, kThreads>>>(data);
  } else if (std::strcmp(tool, "racecheck") == 0) {
    exchange_without_barrier<<<1, kThreads>>>(data);
  } else if (std::strcmp(tool, "synccheck") == 0) {
    cudaMemset(data, 0, kThreads * sizeof(unsigned));
    barrier_for_some<<<1, kThreads>>>(data, kThreads - 16);
    arrive_at_nothing<<<1, kThreads>>>(data);
  } else {
    std::printf("tool: memcheck, initcheck, racecheck or synccheck is required; got %s\n", tool);
    return 2;
  }
  // memcheck ends the kernel with an error: what counts is what the tool has printed.
  cudaDeviceSynchronize();
  cudaFree(data);
  std::printf("has run\n");
  return 0;
}
