// Makes the calls of a case on some device and says what is wrong with what they leave. Without
// CUDA.
#pragma once
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "device/params.h"
#include "matrix.h"

namespace gan::testing {

// The launch of all ranks that are there.
struct OneLaunch {
  struct OfRank {
    RowParams row;
    ExchangeParams exchange;
    TwoShotParams two_shot;
  };
  DType dtype;
  uint32_t ranks;  // of the group
  std::optional<Algorithm> algorithm;
  LaunchShape shape;
  std::vector<OfRank> of;  // of those that are there
};

// Where kernels run.
class Device {
 public:
  virtual ~Device() = default;
  virtual uint8_t* allocate(uint64_t bytes) = 0;
  virtual void free(uint8_t* memory) = 0;
  virtual uint64_t* allocate_host_word() = 0;
  virtual void free_host_word(uint64_t* word) = 0;
  virtual void fill(uint8_t* to, uint8_t byte, uint64_t bytes) = 0;
  virtual void upload(uint8_t* to, const uint8_t* from, uint64_t bytes) = 0;
  virtual void download(uint8_t* to, const uint8_t* from, uint64_t bytes) = 0;
  // Until it is done.
  virtual void launch(const OneLaunch& launch) = 0;
};

// Empty, or what is wrong.
std::string run_case(Device& device, const Case& c, uint64_t seed);

}  // namespace gan::testing
