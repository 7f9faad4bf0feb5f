// Checking of CUDA calls, and what has to be set around them. Host only.
#pragma once
#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace gan {

// CUDA gives an error of a kernel to whoever calls next.
inline constexpr const char* kMaybeEarlier =
    "it may be an earlier kernel's: CUDA_LAUNCH_BLOCKING=1 shows whose";

// Throws `what; got <CUDA's words>; what_to_do`, and leaves no error behind for the next caller to
// find. A literal is not made a string as long as all is well.
inline void check_cuda(cudaError_t status, const char* what,
                       const char* what_to_do = kMaybeEarlier) {
  if (status == cudaSuccess) return;
  cudaGetLastError();
  throw std::runtime_error(std::string(what) + "; got " + cudaGetErrorName(status) + " (" +
                           cudaGetErrorString(status) + "); " + what_to_do);
}
inline void check_cuda(cudaError_t status, const std::string& what,
                       const char* what_to_do = kMaybeEarlier) {
  check_cuda(status, what.c_str(), what_to_do);
}

inline constexpr const char* kUsableDevice = "device: a usable CUDA device is required";
inline constexpr const char* kSeeDevices = "see nvidia-smi and CUDA_VISIBLE_DEVICES";

// The current device, put back at the end of the scope.
class DeviceScope {
 public:
  explicit DeviceScope(int device) {
    check_cuda(cudaGetDevice(&before_), "device: the current CUDA device is required");
    if (before_ == device) return;
    check_cuda(cudaSetDevice(device), kUsableDevice, kSeeDevices);
    changed_ = true;
  }
  ~DeviceScope() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

// Lets this thread allocate, free and copy while some stream is being captured: such calls would
// break the capture, and a garbage collector chooses its own time.
class OutsideCapture {
 public:
  OutsideCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~OutsideCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  OutsideCapture(const OutsideCapture&) = delete;
  OutsideCapture& operator=(const OutsideCapture&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

}  // namespace gan
