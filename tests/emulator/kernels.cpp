// The kernels of one dtype, compiled for the emulator, as csrc/host/launch_<dtype>.cu has them for
// GPUs. Compiled once for each dtype, GAN_KERNELS_DTYPE.
#include "host/kernel_table.cuh"

template struct gan::KernelTable<gan::DType::GAN_KERNELS_DTYPE>;
