// The kernels of one dtype, chosen by number of ranks, packs a thread and form. Each
// launch_<dtype>.cu instantiates it, so that they compile side by side. An algorithm is a line here
// and a function in launch.cu. Without CUDA, so that the emulator's tests have the same table.
#pragma once
#include "device/local_norm.cuh"
#include "device/one_shot.cuh"
#include "device/params.h"
#include "device/row_norm.cuh"
#include "host/plan.h"

namespace gan {

inline constexpr uint32_t kMinRanks = 2;

// For these dtypes the common forms have kernels of their own; each takes its time to compile.
template <DType kType>
inline constexpr bool kHasForms = kType == DType::kBFloat16;

template <DType kType>
struct KernelTable {
  using OneShot = void (*)(OneShotParams);
  using LocalNorm = void (*)(LocalNormParams);

  static OneShot one_shot(uint32_t ranks, bool one_pack, Form form);  // null: not so many ranks
  static LocalNorm local_norm(bool one_pack, Form form);
};

inline Form form_of(const RowParams& row) {
  if (row.residual == nullptr || row.weights_fp32 != 0) return Form::kAny;
  return row.post_weight == nullptr ? Form::kResidual : Form::kSandwich;
}

// A thread's packs of a row, where it has several, lie there.
inline uint32_t dynamic_shared_bytes(const LaunchShape& shape) {
  return shape.packs_a_thread == 1 ? 0 : shape.packs_a_thread * shape.threads * kPackBytes;
}

// Whether the kernels can do these rows in this shape: a plan that is not Python's may be wrong.
inline bool is_possible(const LaunchShape& shape, const RowParams& row) {
  const uint32_t segments =
      shape.packs_a_thread * shape.blocks_a_team * (shape.threads / kSegmentPacks);
  return shape.teams > 0 && shape.teams <= row.rows && shape.blocks() <= kMaxBlocks &&
         shape.threads % kSegmentPacks == 0 && segments <= kMaxSegments &&
         segments * kSegmentPacks >= row.row_packs;
}

namespace detail {

template <DType kType, uint32_t kRanks>
typename KernelTable<kType>::OneShot one_shot_of(bool one_pack, Form form) {
  if (!one_pack) return one_shot<kType, kRanks, false, Form::kAny>;
  if constexpr (kHasForms<kType>) {
    if (form == Form::kResidual) return one_shot<kType, kRanks, true, Form::kResidual>;
    if (form == Form::kSandwich) return one_shot<kType, kRanks, true, Form::kSandwich>;
  }
  return one_shot<kType, kRanks, true, Form::kAny>;
}

}  // namespace detail

template <DType kType>
typename KernelTable<kType>::OneShot KernelTable<kType>::one_shot(uint32_t ranks, bool one_pack,
                                                                  Form form) {
  using detail::one_shot_of;
  static constexpr OneShot (*kOf[])(bool, Form) = {
      one_shot_of<kType, 2>, one_shot_of<kType, 3>, one_shot_of<kType, 4>, one_shot_of<kType, 5>,
      one_shot_of<kType, 6>, one_shot_of<kType, 7>, one_shot_of<kType, 8>,
  };
  if (ranks < kMinRanks || ranks > kMaxRanks) return nullptr;
  return kOf[ranks - kMinRanks](one_pack, form);
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
