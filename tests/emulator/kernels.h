// The kernels under test: the product's, from the product's own table.
//
// A new kernel is a function here that binds its parameters, and a line in kKernels.
#pragma once
#include <functional>
#include <stdexcept>

#include "host/kernel_table.cuh"
#include "host/plan.h"

namespace gan {

// kernels.cpp, once for each dtype.
extern template struct KernelTable<DType::kBFloat16>;
extern template struct KernelTable<DType::kFloat16>;
extern template struct KernelTable<DType::kFloat32>;

}  // namespace gan

namespace gan::testing {

// What a launch is given.
struct KernelCall {
  DType dtype;
  uint32_t ranks;
  RowParams row;
  LaunchShape shape;
  ExchangeParams exchange;  // for kernels that exchange
};

struct Kernel {
  const char* name;
  bool exchanges;  // with the peers, whose rows it adds; such a launch counts as a call
  std::function<void()> (*bind)(const KernelCall&);  // what each thread runs
};

template <class Body>
auto with_table(DType dtype, Body body) {
  switch (dtype) {
    case DType::kBFloat16:
      return body(KernelTable<DType::kBFloat16>{});
    case DType::kFloat16:
      return body(KernelTable<DType::kFloat16>{});
    case DType::kFloat32:
      break;
  }
  return body(KernelTable<DType::kFloat32>{});
}

template <class Params>
std::function<void()> bound(void (*kernel)(Params), const Params& params) {
  if (kernel == nullptr) throw std::logic_error("kernels: one for this call is required");
  return [kernel, params] { kernel(params); };
}

inline std::function<void()> bind_one_shot(const KernelCall& c) {
  return with_table(c.dtype, [&](auto table) {
    return bound(table.one_shot(c.ranks, c.shape.packs_a_thread == 1, form_of(c.row)),
                 OneShotParams{c.row, c.shape.trigger, c.exchange});
  });
}
inline std::function<void()> bind_local_norm(const KernelCall& c) {
  return with_table(c.dtype, [&](auto table) {
    return bound(table.local_norm(c.shape.packs_a_thread == 1, form_of(c.row)),
                 LocalNormParams{c.row, c.shape.trigger});
  });
}

inline constexpr Kernel kKernels[] = {
    {"one_shot", true, bind_one_shot},
    {"local_norm", false, bind_local_norm},
};
inline constexpr uint32_t kKernelCount = sizeof(kKernels) / sizeof(kKernels[0]);

}  // namespace gan::testing
