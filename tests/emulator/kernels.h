// The kernels under test: the product's, from the product's own table.
//
// A new kernel is a function here that binds its parameters, and a line in kKernels; if it takes
// other numbers of rows than those here, a function that says how many.
#pragma once
#include <functional>
#include <stdexcept>

#include "device/inbox.h"
#include "host/kernel_table.cuh"
#include "host/plan.h"
#include "random.h"

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
  uint64_t (*max_rows)(const InboxLayout&, uint64_t row_bytes);  // of a launch
  std::function<void()> (*bind)(const KernelCall&);              // what each thread runs
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

inline uint64_t max_rows_of_areas(const InboxLayout& layout, uint64_t row_bytes) {
  return layout.max_rows(row_bytes);
}
inline uint64_t any_rows(const InboxLayout&, uint64_t) { return UINT32_MAX; }

inline constexpr Kernel kKernels[] = {
    {"one_shot", true, max_rows_of_areas, bind_one_shot},
    {"local_norm", false, any_rows, bind_local_norm},
};
inline constexpr uint32_t kKernelCount = sizeof(kKernels) / sizeof(kKernels[0]);

// A kernel that exchanges.
inline uint32_t random_exchange(emulator::Random& random) {
  for (;;) {
    const uint32_t kernel = random.below(kKernelCount);
    if (kKernels[kernel].exchanges) return kernel;
  }
}

}  // namespace gan::testing
