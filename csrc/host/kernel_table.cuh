// The kernels of one dtype, chosen by algorithm, number of ranks, packs a thread and form. Each
// launch_<dtype>.cu instantiates it, so that they compile side by side. An algorithm is a line of
// fused() here. Without CUDA, so that the emulator's tests have the same table.
#pragma once
#include "device/local_norm.cuh"
#include "device/one_shot.cuh"
#include "device/params.h"
#include "device/row_norm.cuh"
#include "device/two_shot.cuh"
#include "host/plan.h"

namespace gan {

inline constexpr uint32_t kMinRanks = 2;

// For these dtypes the common forms have kernels of their own; each takes its time to compile.
template <DType kType>
inline constexpr bool kHasForms = kType == DType::kBFloat16;

template <DType kType>
struct KernelTable {
  using Fused = void (*)(FusedParams);
  using LocalNorm = void (*)(LocalNormParams);

  // Null: not for so many ranks.
  static Fused fused(Algorithm algorithm, uint32_t ranks, bool one_pack, Form form);
  static LocalNorm local_norm(bool one_pack, Form form);
};

// Calls body with the table of a dtype.
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

inline Form form_of(const RowParams& row) {
  if (row.residual == nullptr || row.weights_fp32 != 0) return Form::kAny;
  return row.post_weight == nullptr ? Form::kResidual : Form::kSandwich;
}

inline uint32_t dynamic_shared_bytes(const LaunchShape& shape) {
  return kept_bytes(shape.packs_a_thread, shape.threads);
}

// Whether the kernels can do these rows in this shape: a plan that is not Python's may be wrong.
inline bool is_possible(const LaunchShape& shape, const RowParams& row) {
  const uint32_t segments =
      shape.packs_a_thread * shape.blocks_a_team * (shape.threads / kSegmentPacks);
  return shape.teams > 0 && shape.teams <= row.rows && shape.blocks() <= kMaxBlocks &&
         shape.threads % kSegmentPacks == 0 && segments <= kMaxSegments &&
         segments * kSegmentPacks >= row.row_packs && shape.lead_rows > 0 &&
         shape.packs_a_thread * shape.threads <= kMaxRowPacks;  // of shared memory
}

namespace detail {

template <DType kType, uint32_t kRanks, bool kOnePack, Form kForm>
typename KernelTable<kType>::Fused fused_of(Algorithm algorithm) {
  return algorithm == Algorithm::kOneShot ? one_shot<kType, kRanks, kOnePack, kForm>
                                          : two_shot<kType, kRanks, kOnePack, kForm>;
}

template <DType kType, uint32_t kRanks>
typename KernelTable<kType>::Fused fused_of(Algorithm algorithm, bool one_pack, Form form) {
  if (!one_pack) return fused_of<kType, kRanks, false, Form::kAny>(algorithm);
  if constexpr (kHasForms<kType>) {
    if (form == Form::kResidual) return fused_of<kType, kRanks, true, Form::kResidual>(algorithm);
    if (form == Form::kSandwich) return fused_of<kType, kRanks, true, Form::kSandwich>(algorithm);
  }
  return fused_of<kType, kRanks, true, Form::kAny>(algorithm);
}

}  // namespace detail

template <DType kType>
typename KernelTable<kType>::Fused KernelTable<kType>::fused(Algorithm algorithm, uint32_t ranks,
                                                             bool one_pack, Form form) {
  using detail::fused_of;
  static constexpr Fused (*kOf[])(Algorithm, bool, Form) = {
      fused_of<kType, 2>, fused_of<kType, 3>, fused_of<kType, 4>, fused_of<kType, 5>,
      fused_of<kType, 6>, fused_of<kType, 7>, fused_of<kType, 8>,
  };
  if (ranks < kMinRanks || ranks > kMaxRanks) return nullptr;
  return kOf[ranks - kMinRanks](algorithm, one_pack, form);
}

template <DType kType>
typename KernelTable<kType>::LocalNorm KernelTable<kType>::local_norm(bool one_pack, Form form) {
  if (!one_pack) return gan::local_norm<kType, false, Form::kAny>;
  if constexpr (kHasForms<kType>) {
    if (form == Form::kResidual) return gan::local_norm<kType, true, Form::kResidual>;
    if (form == Form::kSandwich) return gan::local_norm<kType, true, Form::kSandwich>;
  }
  return gan::local_norm<kType, true, Form::kAny>;
}

}  // namespace gan
