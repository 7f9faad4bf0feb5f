// The kernels of one dtype, compiled for the emulator, as csrc/host/launch_<dtype>.cu has them for
// GPUs. Compiled once for each dtype, GAN_KERNELS_DTYPE.
#include "kernels.h"

#include "device/debug_mode.cuh"
#include "host/kernel_table.cuh"

template struct gan::KernelTable<gan::DType::GAN_KERNELS_DTYPE>;

// They are in all objects, like all that does not depend on the dtype.
__attribute__((weak)) gan::testing::DebugKernels gan::testing::debug_kernels() {
  return {enter_call, leave_call};
}
