#include "device/debug_mode.cuh"
#include "device/inbox.h"
#include "device/pack.cuh"
#include "device/row_norm.cuh"
#include "host/kernel_table.cuh"
#include "host/launch.h"

namespace gan {

extern template struct KernelTable<DType::kBFloat16>;
extern template struct KernelTable<DType::kFloat16>;
extern template struct KernelTable<DType::kFloat32>;

namespace {

template <class Params>
cudaError_t launch(void (*kernel)(Params), const Params& params, const LaunchShape& shape,
                   cudaStream_t stream) {
  if (kernel == nullptr || !is_possible(shape, params.row)) return cudaErrorInvalidConfiguration;
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config{};
  config.gridDim = shape.blocks();
  config.blockDim = shape.threads;
  config.dynamicSmemBytes = dynamic_shared_bytes(shape);
  config.stream = stream;
  config.attrs = attributes;
  if (shape.trigger != Trigger::kNever) {
    cudaLaunchAttribute& early = attributes[config.numAttrs++];
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
  }
  if (shape.blocks_a_team > 1) {
    cudaLaunchAttribute& cluster = attributes[config.numAttrs++];
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {shape.blocks_a_team, 1, 1};
  }
  return cudaLaunchKernelEx(&config, kernel, params);
}

// Of those that calls of so many ranks launch (1: the local ones): use(kernel, keeps_rows), until
// one fails.
template <class Use>
cudaError_t for_each_kernel(uint32_t ranks, const Use& use) {
  for (const void* kernel :
       {reinterpret_cast<const void*>(enter_call), reinterpret_cast<const void*>(leave_call)}) {
    if (const cudaError_t status = use(kernel, false); status != cudaSuccess) return status;
  }
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16, DType::kFloat32}) {
    for (const bool one_pack : {false, true}) {
      for (const Form form : {Form::kAny, Form::kResidual, Form::kSandwich}) {
        const auto use_it = [&](auto kernel) {
          return use(reinterpret_cast<const void*>(kernel), !one_pack);
        };
        const cudaError_t status = with_table(dtype, [&](auto table) {
          if (ranks == 1) return use_it(table.local_norm(one_pack, form));
          for (const Algorithm algorithm : {Algorithm::kOneShot, Algorithm::kTwoShot}) {
            const cudaError_t failed = use_it(table.fused(algorithm, ranks, one_pack, form));
            if (failed != cudaSuccess) return failed;
          }
          return cudaSuccess;
        });
        if (status != cudaSuccess) return status;
      }
    }
  }
  return cudaSuccess;
}

}  // namespace

cudaError_t launch_fused(DType dtype, uint32_t ranks, const FusedParams& params,
                         const LaunchShape& shape, cudaStream_t stream) {
  return with_table(dtype, [&](auto table) {
    return launch(
        table.fused(shape.algorithm, ranks, shape.packs_a_thread == 1, form_of(params.row)), params,
        shape, stream);
  });
}

cudaError_t launch_local_norm(DType dtype, const LocalNormParams& params, const LaunchShape& shape,
                              cudaStream_t stream) {
  return with_table(dtype, [&](auto table) {
    return launch(table.local_norm(shape.packs_a_thread == 1, form_of(params.row)), params, shape,
                  stream);
  });
}

cudaError_t launch_enter_call(uint32_t ranks, const DebugParams& params, cudaStream_t stream) {
  enter_call<<<1, ranks * kCallFields, 0, stream>>>(params);
  return cudaGetLastError();
}

cudaError_t launch_leave_call(uint8_t* inbox, cudaStream_t stream) {
  leave_call<<<1, 1, 0, stream>>>(inbox);
  return cudaGetLastError();
}

cudaError_t preload_kernels(uint32_t ranks) {
  return for_each_kernel(ranks, [](const void* kernel, bool keeps_rows) {
    cudaFuncAttributes unused;
    const cudaError_t status = cudaFuncGetAttributes(&unused, kernel);
    if (status != cudaSuccess || !keeps_rows) return status;
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                kMaxRowPacks * kPackBytes);
  });
}

cudaError_t prefer_shared_memory(uint32_t ranks) {
  return for_each_kernel(ranks, [](const void* kernel, bool) {
    return cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                cudaSharedmemCarveoutMaxShared);
  });
}

cudaError_t kernel_architecture(int* architecture) {
  const auto kernel = KernelTable<DType::kBFloat16>::local_norm(true, Form::kAny);
  cudaFuncAttributes attributes;
  const cudaError_t status =
      cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel));
  if (status == cudaSuccess) *architecture = attributes.ptxVersion;
  return status;
}

}  // namespace gan
