// What the ranks have in memory: their tensors, and words of the host that GPUs write and read.
#pragma once
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <vector>

#include "device/params.h"
#include "gpus.h"

namespace gan::streams {

using Element = __nv_bfloat16;
inline constexpr uint32_t kPackElements = kPackBytes / sizeof(Element);

// ---- of a GPU ----

static __global__ void fill(Element* data, size_t count, uint32_t seed, float scale) {
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < count;
       i += size_t{gridDim.x} * blockDim.x) {
    uint32_t h = static_cast<uint32_t>(i) * 2654435761u ^ seed * 40503u;
    h = (h ^ h >> 16) * 0x85ebca6bu;
    h = (h ^ h >> 13) * 0xc2b2ae35u;
    h ^= h >> 16;
    data[i] = __float2bfloat16(scale * (static_cast<float>(h & 0xffff) / 32768.0f - 1.0f));
  }
}

class Memory {
 public:
  Memory(int device, size_t bytes) : device_(device) {
    DeviceScope scope(device);
    check(cudaMalloc(&data_, bytes), "streams: enough memory of the GPU is required");
  }
  ~Memory() {
    free_on(device_, [&] { cudaFree(data_); });
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  int device() const { return device_; }
  uint8_t* data() const { return data_; }
  void set(size_t first, size_t bytes, int value) {
    DeviceScope scope(device_);
    check(cudaMemset(data_ + first, value, bytes));
  }

 private:
  int device_;
  uint8_t* data_ = nullptr;
};

class Array {
 public:
  Array(int device, size_t count, uint32_t seed, float scale)
      : memory_(device, count * sizeof(Element)), count_(count) {
    DeviceScope scope(device);
    fill<<<256, 256>>>(data(), count, seed, scale);
    check(cudaGetLastError());
  }

  Element* data() const { return reinterpret_cast<Element*>(memory_.data()); }
  void poison() { memory_.set(0, count_ * sizeof(Element), 0xff); }
  std::vector<char> bytes(size_t count) const {
    DeviceScope scope(memory_.device());
    std::vector<char> host(count * sizeof(Element));
    check(cudaMemcpy(host.data(), data(), host.size(), cudaMemcpyDeviceToHost));
    return host;
  }

 private:
  Memory memory_;
  size_t count_;
};

// The residual is the same for all ranks, and so are the outputs.
struct RankData {
  Array x, residual, norm_out, residual_out;
  RankData(int device, uint32_t rank, size_t count)
      : x(device, count, 11 + rank, 1.0f),
        residual(device, count, 99, 1.0f),
        norm_out(device, count, 0, 0.0f),
        residual_out(device, count, 0, 0.0f) {}
};

struct Weights {
  Array weight, post_weight;
  Weights(int device, uint32_t hidden)
      : weight(device, hidden, 7, 0.3f), post_weight(device, hidden, 8, 0.3f) {}
};

// Of a call in the plain form; `packs_a_thread` is of its launch.
inline RowParams row_params(const RankData& data, const Array& weight, uint32_t rows,
                            uint32_t hidden) {
  RowParams row{};
  row.x = data.x.data();
  row.weight = weight.data();
  row.norm_out = data.norm_out.data();
  row.residual_out = data.residual_out.data();
  row.rows = rows;
  row.row_packs = hidden / kPackElements;
  row.hidden = static_cast<float>(hidden);
  row.hidden_reciprocal = 1.0f / row.hidden;
  row.eps = 1e-6f;
  row.weight_bias = 1.0f;
  return row;
}

// ---- of the host ----

// Zeros at first. All GPUs see them, at the host's address.
class HostWords {
 public:
  explicit HostWords(size_t count) : count_(count) {
    check(cudaHostAlloc(&words_, count * sizeof(*words_),
                        cudaHostAllocPortable | cudaHostAllocMapped));
    std::fill_n(words_, count, 0);
  }
  ~HostWords() { cudaFreeHost(words_); }
  HostWords(const HostWords&) = delete;
  HostWords& operator=(const HostWords&) = delete;

  uint64_t* at(size_t i) const { return words_ + i; }
  void set(size_t i, uint64_t value) { __atomic_store_n(at(i), value, __ATOMIC_RELEASE); }
  bool any() const {
    for (size_t i = 0; i < count_; ++i) {
      if (__atomic_load_n(at(i), __ATOMIC_ACQUIRE) != 0) return true;
    }
    return false;
  }

 private:
  uint64_t* words_ = nullptr;
  size_t count_;
};

}  // namespace gan::streams
