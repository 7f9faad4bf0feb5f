// The kernels of the product's table, by their addresses.
#pragma once
#include <set>

#include "host/kernel_table.cuh"
#include "matrix.h"

namespace gan {

// csrc/host/launch_<dtype>.cu.
extern template struct KernelTable<DType::kBFloat16>;
extern template struct KernelTable<DType::kFloat16>;
extern template struct KernelTable<DType::kFloat32>;

}  // namespace gan

namespace gan::testing {

// Calls body with the kernel of a launch, which takes FusedParams or LocalNormParams.
template <class Body>
auto with_kernel(DType dtype, uint32_t ranks, std::optional<Algorithm> algorithm, bool one_pack,
                 Form form, Body body) {
  return with_table(dtype, [&](auto table) {
    if (!algorithm) return body(table.local_norm(one_pack, form));
    return body(table.fused(*algorithm, ranks, one_pack, form));
  });
}

inline const void* address_of(DType dtype, uint32_t ranks, std::optional<Algorithm> algorithm,
                              bool one_pack, Form form) {
  return with_kernel(dtype, ranks, algorithm, one_pack, form,
                     [](auto kernel) { return reinterpret_cast<const void*>(kernel); });
}

inline std::set<const void*> all_kernels() {
  std::set<const void*> kernels;
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16, DType::kFloat32}) {
    for (const bool one_pack : {false, true}) {
      for (const Form form : {Form::kAny, Form::kResidual, Form::kSandwich}) {
        kernels.insert(address_of(dtype, 1, std::nullopt, one_pack, form));
        for (uint32_t ranks = kMinRanks; ranks <= kMaxRanks; ++ranks) {
          for (const Algorithm algorithm : {Algorithm::kOneShot, Algorithm::kTwoShot})
            kernels.insert(address_of(dtype, ranks, algorithm, one_pack, form));
        }
      }
    }
  }
  return kernels;
}

}  // namespace gan::testing
