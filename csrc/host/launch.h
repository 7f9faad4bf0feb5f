// Launching kernels: from a dtype, a number of ranks and a shape to cudaLaunchKernelEx.
#pragma once
#include <cuda_runtime_api.h>

#include "device/params.h"
#include "host/plan.h"

namespace gan {

cudaError_t launch_fused(DType dtype, uint32_t ranks, const FusedParams& params,
                         const LaunchShape& shape, cudaStream_t stream);
cudaError_t launch_local_norm(DType dtype, const LocalNormParams& params, const LaunchShape& shape,
                              cudaStream_t stream);

// Debug mode: before and behind a call's kernels.
cudaError_t launch_enter_call(uint32_t ranks, const DebugParams& params, cudaStream_t stream);
cudaError_t launch_leave_call(uint8_t* inbox, cudaStream_t stream);

// Has the current device load all kernels of so many ranks (1: the local kernels). Loading at the
// first launch may wait for running kernels, and those may be waiting for that launch.
cudaError_t preload_kernels(uint32_t ranks);

// Has all of them ask for the same division of an SM's memory between L1 and shared memory: the
// most shared. For ranks that are streams of one process: it is not changed while a block is on the
// SM, so a rank's kernel that asks for another cannot start where its peers' wait for it.
// It holds for the rest of the process.
cudaError_t prefer_shared_memory(uint32_t ranks);

// What the kernels that the current device runs were compiled for: 90 for sm_90 or its PTX. Code
// for an older architecture may have been compiled again by the driver.
cudaError_t kernel_architecture(int* architecture);

}  // namespace gan
