// The kernels under test: the product's, from the product's own table.
//
// A new kernel is a line in kKernels; if it does not exchange, a function that binds its parameters
// too.
#pragma once
#include <functional>
#include <optional>
#include <stdexcept>

#include "device/inbox.h"
#include "host/exchange_setup.h"
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
  // Of a kernel that exchanges rows with the peers and adds them; such a launch counts as a call.
  std::optional<Algorithm> algorithm;
  std::function<void()> (*bind)(const KernelCall&);  // what each thread runs

  constexpr bool exchanges() const { return algorithm.has_value(); }
  // What of an area a row takes.
  uint64_t row_bytes_of_area(uint32_t ranks, uint64_t row_bytes) const {
    if (!exchanges()) return 0;
    return algorithm == Algorithm::kOneShot ? one_shot_row_bytes(row_bytes)
                                            : two_shot_row_bytes(ranks, row_bytes);
  }
};

template <class Params>
std::function<void()> bound(void (*kernel)(Params), const Params& params) {
  if (kernel == nullptr) throw std::logic_error("kernels: one for this call is required");
  return [kernel, params] { kernel(params); };
}

inline std::function<void()> bind_fused(const KernelCall& c) {
  return with_table(c.dtype, [&](auto table) {
    return bound(
        table.fused(c.shape.algorithm, c.ranks, c.shape.packs_a_thread == 1, form_of(c.row)),
        FusedParams{c.row, c.shape.trigger, c.exchange,
                    two_shot_params(c.ranks, c.row.rows, c.row.row_packs, c.shape.teams,
                                    c.shape.lead_rows)});
  });
}
inline std::function<void()> bind_local_norm(const KernelCall& c) {
  return with_table(c.dtype, [&](auto table) {
    return bound(table.local_norm(c.shape.packs_a_thread == 1, form_of(c.row)),
                 LocalNormParams{c.row, c.shape.trigger});
  });
}

struct DebugKernels {
  void (*enter_call)(DebugParams);
  void (*leave_call)(uint8_t*);
};
DebugKernels debug_kernels();

inline constexpr Kernel kKernels[] = {
    {"one_shot", Algorithm::kOneShot, bind_fused},
    {"two_shot", Algorithm::kTwoShot, bind_fused},
    {"local_norm", std::nullopt, bind_local_norm},
};
inline constexpr uint32_t kKernelCount = sizeof(kKernels) / sizeof(kKernels[0]);

// A kernel that exchanges.
inline uint32_t random_exchange(emulator::Random& random) {
  for (;;) {
    const uint32_t kernel = random.below(kKernelCount);
    if (kKernels[kernel].exchanges()) return kernel;
  }
}

}  // namespace gan::testing
