// The epilogue of the contract: a row of sums becomes residual_out and norm_out.
//
//   plain:     h = a            residual:  h = T(residual + a)
//   sandwich:  p = T((a * rstd(a)) * (bias + post_weight)),  h = T(residual + p)
//   norm_out = T((h * rstd(h)) * (bias + weight)),  residual_out = h
//   rstd(v) = 1 / sqrt(sum(v^2) / hidden + eps)
//
// T(...) rounds to nearest even; all else is fp32, one IEEE operation at a time. The order of the
// sum of squares depends on hidden and T alone, so that the bits are the same however a row is
// spread over threads, warps and blocks: a pack in element order; 32 consecutive packs (a segment)
// by xor-shuffle; lane l adds segments l, l + 32, ... in order; the 32 lanes by xor-shuffle.
// reference.py does the same in torch.
//
// A team shares a row: one block, or the blocks of a cluster. A thread has one pack of it
// (kOnePack), kept in registers, or several, kept in shared memory. The packs of a warp are whole
// segments: pack j of a thread is (j * blocks + block) * blockDim.x + threadIdx.x.
#pragma once
#include "gpu.cuh"
#include "pack.cuh"
#include "params.h"
#include "rstd.cuh"

namespace gan {

inline constexpr uint32_t kSegmentPacks = kWarpLanes;
// Of the longest row, and what rounding up to whole warps of every block adds at most: is_possible
// (kernel_table.cuh) checks it.
inline constexpr uint32_t kMaxSegments = kMaxRowPacks / kSegmentPacks + 32;

// So many every thread can add by itself, in less time than by shuffles. That takes registers, so
// not all kernels do it. kLast: in the last sum of a row alone, of which the sandwich form has two.
inline constexpr uint32_t kFewSegments = 16;
enum class FewByThread { kNever, kLast, kAlways };

// Part of a kernel's shared memory. Two buffers, used in turn: a warp may be one reduction ahead of
// the others, not two, since each reduction waits for the sums of all warps.
struct SegmentSums {
  alignas(16) float sum[2][kMaxSegments];
  ByteCounter received[2];  // in clusters of several blocks, what has come of `sum`
};

// A team's place in the grid, and this thread's packs of the team's row.
struct Team {
  Cluster cluster;
  uint32_t packs;  // of a thread, at most

  GAN_DEVICE uint32_t first_row() const { return cluster.index; }
  GAN_DEVICE uint32_t row_step() const { return cluster.count; }
  GAN_DEVICE uint32_t pack(uint32_t j) const {
    return (j * cluster.blocks + cluster.block) * blockDim.x + threadIdx.x;
  }
  GAN_DEVICE uint32_t segment(uint32_t j) const { return pack(j) / kSegmentPacks; }
  GAN_DEVICE uint32_t segments() const {
    return packs * cluster.blocks * (blockDim.x / kSegmentPacks);
  }
};

template <bool kOnePack>
GAN_DEVICE Team this_team(const RowParams& params) {
  return {this_cluster(), kOnePack ? 1 : params.packs_a_thread};
}

// ---- packs ----

GAN_DEVICE float warp_sum(float value) {
#pragma unroll
  for (uint32_t mask = kWarpLanes / 2; mask != 0; mask /= 2) {
    value = add_rn(value, shuffle_xor(value, mask));
  }
  return value;
}

template <DType kType>
GAN_DEVICE float sum_of_squares(const Floats<kType>& f) {
  float sum = mul_rn(f.at[0], f.at[0]);
#pragma unroll
  for (uint32_t i = 1; i < Floats<kType>::kCount; ++i) {
    sum = add_rn(sum, mul_rn(f.at[i], f.at[i]));
  }
  return sum;
}

// The elements of a weight vector that belong to a pack, from fp32 although T is not.
template <DType kType>
GAN_DEVICE Floats<kType> load_fp32_weights(const void* weight, uint32_t pack) {
  constexpr uint32_t kPacks = Floats<kType>::kPerWord;  // of fp32 in a pack of T
  Floats<kType> f;
#pragma unroll
  for (uint32_t i = 0; i < kPacks; ++i) {
    const Floats<DType::kFloat32> part =
        widen<DType::kFloat32>(load(static_cast<const Pack*>(weight) + pack * kPacks + i));
#pragma unroll
    for (uint32_t k = 0; k < part.kCount; ++k) f.at[i * part.kCount + k] = part.at[k];
  }
  return f;
}

// bias + weight.
template <DType kType>
GAN_DEVICE Floats<kType> scale_of(float bias, Floats<kType> weight) {
#pragma unroll
  for (uint32_t i = 0; i < Floats<kType>::kCount; ++i) weight.at[i] = add_rn(bias, weight.at[i]);
  return weight;
}

// T((v * rstd) * scale).
template <DType kType>
GAN_DEVICE Pack normalise(Pack v, float rstd, const Floats<kType>& scale) {
  Floats<kType> f = widen<kType>(v);
#pragma unroll
  for (uint32_t i = 0; i < Floats<kType>::kCount; ++i) {
    f.at[i] = mul_rn(mul_rn(f.at[i], rstd), scale.at[i]);
  }
  return round_to_pack<kType>(f);
}

// What lane 0 of kCount lanes has after an xor-shuffle, of their values.
template <uint32_t kCount>
GAN_DEVICE float tree_sum(const float* value) {
  if constexpr (kCount == 1) {
    return value[0];
  } else {
    float half[kCount / 2];
#pragma unroll
    for (uint32_t i = 0; i < kCount / 2; ++i) half[i] = add_rn(value[i], value[i + kCount / 2]);
    return tree_sum<kCount / 2>(half);
  }
}

// The sum of a row's segments: lane l adds segments l, l + 32, ..., and the lanes are added by
// xor-shuffle. Of few it is the same tree in every thread, without the lanes beyond, which have 0.
template <bool kByThread>
GAN_DEVICE float sum_of_segments(const float (&segment)[kMaxSegments], uint32_t segments) {
  if (kByThread && segments <= kFewSegments) return tree_sum<kFewSegments>(segment);
  float sum = 0.0f;
#pragma unroll 1
  for (uint32_t s = threadIdx.x % kWarpLanes; s < segments; s += kWarpLanes)
    sum = add_rn(sum, segment[s]);
  return warp_sum(sum);
}

// ---- a row ----

// What a thread keeps of a row between two passes over it.
template <bool kOnePack>
class RowPacks {
 public:
  GAN_DEVICE Pack get(uint32_t j) const {
    if constexpr (kOnePack) return pack_;
    return block_dynamic_shared<Pack>()[j * blockDim.x + threadIdx.x];
  }
  GAN_DEVICE void set(uint32_t j, Pack pack) {
    if constexpr (kOnePack) {
      pack_ = pack;
    } else {
      block_dynamic_shared<Pack>()[j * blockDim.x + threadIdx.x] = pack;
    }
  }

 private:
  Pack pack_;
};

// Which of the three forms a kernel is for. A branch that all threads take alike still takes a few
// nanoseconds, and there are many: so the common forms, with weights of T, have kernels without
// them (kernel_table.cuh says which).
enum class Form { kAny, kResidual, kSandwich };

// The epilogue of a row after another. For each row: expect(row, j), expect_weight(j) and
// accept(row, j, sum) for every pack j of the thread, then finish(row, ...), with all threads of
// the team. kAhead: what the end of a row needs is computed before the team waits. It takes
// registers, as kFew does.
template <DType kType, bool kOnePack, Form kForm, FewByThread kFew = FewByThread::kAlways,
          bool kAhead = true>
class RowNorm {
 public:
  GAN_DEVICE RowNorm(const RowParams& params, const Team& team, SegmentSums& sums)
      : params_(params),
        team_(team),
        sums_(sums),
        hidden_(held(params.hidden)),
        hidden_reciprocal_(held(params.hidden_reciprocal)),
        eps_(held(params.eps)) {}

  // Before the first row, with all threads.
  GAN_DEVICE void start() {
    if (kFew != FewByThread::kNever && threadIdx.x == 0) {
      // Whoever waits for a sum waits for this thread, and so for these.
#pragma unroll 1
      for (uint32_t s = team_.segments(); s < kFewSegments; ++s)
        sums_.sum[0][s] = sums_.sum[1][s] = 0;
    }
    if (team_.cluster.blocks == 1) return;
    if (threadIdx.x == 0) {
      init_byte_counter(&sums_.received[0]);
      init_byte_counter(&sums_.received[1]);
    }
    cluster_start();
  }

  // Loads what pack j needs besides its sum, so that it is here when the sum is.
  GAN_DEVICE void expect(uint32_t row, uint32_t j) {
    if (!GAN_UNLIKELY(!has_residual()) && in_row(j)) residual_ = load(residual_address(row, j));
  }
  // And what it needs of the weight; at the latest before accept.
  GAN_DEVICE void expect_weight(uint32_t j) {
    if (kOnePack) weight_ = load_weight(is_sandwich() ? params_.post_weight : params_.weight, j);
  }

  // What a sum is until it is known: NaN; zero where the pack is beyond the row.
  GAN_DEVICE Pack before_sum(uint32_t j) const { return in_row(j) ? nan_pack() : zero_pack(); }

  // Takes the sum of pack j, zero where the pack is beyond the row.
  GAN_DEVICE void accept(uint32_t row, uint32_t j, Pack a) {
    if (GAN_UNLIKELY(is_sandwich())) {
      add_squares(j, a);
    } else {
      a = enter_residual(row, j, a);
    }
    packs_.set(j, a);
  }

  // Writes what is left of the row. True when an element of it is NaN: the caller may know why.
  // Calls prepare_next() before the team waits for each other for the last time; it may expect the
  // only pack of another row.
  template <class PrepareNext>
  GAN_DEVICE bool finish(uint32_t row, PrepareNext prepare_next) {
    if (GAN_UNLIKELY(is_sandwich())) {
      const Pack next_weight = kOnePack ? load_weight(params_.weight, 0) : zero_pack();
      const float post_rstd = reduce<kFew == FewByThread::kAlways>([] {});
      for (uint32_t j = 0; j < team_.packs; ++j) {
        if (!kOnePack) {
          expect(row, j);
          weight_ = load_weight(params_.post_weight, j);
        }
        Pack p = packs_.get(j);
        if (in_row(j)) p = normalise<kType>(p, post_rstd, scale(j, params_.post_weight));
        weight_ = next_weight;
        packs_.set(j, enter_residual(row, j, p));
      }
    }
    Pack* norm_out = pack_address(params_.norm_out, row, 0);
    if (kAhead && kOnePack) norm_out = computed(norm_out);
    const float rstd = reduce<kFew != FewByThread::kNever>(prepare_next);
    for (uint32_t j = 0; j < team_.packs; ++j) {
      if (!kOnePack) {
        weight_ = load_weight(params_.weight, j);
        norm_out = pack_address(params_.norm_out, row, j);
      }
      const Pack out = normalise<kType>(packs_.get(j), rstd, scale(j, params_.weight));
      if (in_row(j)) store(norm_out, out);
    }
    return is_nan(rstd);
  }

  // residual_out becomes NaN, for a row that could not be finished.
  GAN_DEVICE void spoil(uint32_t row) {
    for (uint32_t j = 0; j < team_.packs; ++j) {
      if (in_row(j)) store_pack(params_.residual_out, row, j, nan_pack());
    }
  }

  // Of a row that comes later.
  GAN_DEVICE void prefetch_x(uint32_t row, uint32_t j) {
    if (row < params_.rows && in_row(j)) prefetch(x_address(row, j));
  }
  GAN_DEVICE void prefetch_residual(uint32_t row, uint32_t j) {
    if (row < params_.rows && in_row(j)) prefetch(residual_address(row, j));
  }

  GAN_DEVICE bool in_row(uint32_t j) const { return team_.pack(j) < params_.row_packs; }
  GAN_DEVICE Pack load_x(uint32_t row, uint32_t j) const { return load(x_address(row, j)); }
  GAN_DEVICE const Pack* x_address(uint32_t row, uint32_t j) const {
    return address(params_.x, row, j);
  }
  // Of x where there is no residual.
  GAN_DEVICE const Pack* residual_address(uint32_t row, uint32_t j) const {
    return address(has_residual() ? params_.residual : params_.x, row, j);
  }
  GAN_DEVICE const Pack* weight_address(uint32_t j) const {
    return weight_address(params_.weight, j);
  }

 private:
  GAN_DEVICE bool has_residual() const {
    return kForm != Form::kAny || params_.residual != nullptr;
  }
  GAN_DEVICE bool is_sandwich() const {
    return kForm == Form::kAny ? params_.post_weight != nullptr : kForm == Form::kSandwich;
  }
  GAN_DEVICE bool has_fp32_weights() const {
    return kForm == Form::kAny && params_.weights_fp32 != 0;
  }
  GAN_DEVICE uint64_t index(uint32_t row, uint32_t j) const {
    return uint64_t{row} * params_.row_packs + team_.pack(j);
  }
  GAN_DEVICE const Pack* address(const void* rows, uint32_t row, uint32_t j) const {
    return static_cast<const Pack*>(rows) + index(row, j);
  }
  GAN_DEVICE const Pack* weight_address(const void* weight, uint32_t j) const {
    return static_cast<const Pack*>(weight) + team_.pack(j);
  }
  GAN_DEVICE Pack* pack_address(void* rows, uint32_t row, uint32_t j) const {
    return static_cast<Pack*>(rows) + index(row, j);
  }
  GAN_DEVICE void store_pack(void* rows, uint32_t row, uint32_t j, Pack pack) {
    store(pack_address(rows, row, j), pack);
  }
  // Of T. Where weights are fp32, scale loads them: held ahead they would take twice the
  // registers.
  GAN_DEVICE Pack load_weight(const void* from, uint32_t j) const {
    if (GAN_UNLIKELY(has_fp32_weights()) || !in_row(j)) return zero_pack();
    return load(weight_address(from, j));
  }
  // bias + weight of pack j. `weight` is what weight_ has been loaded from.
  GAN_DEVICE Floats<kType> scale(uint32_t j, const void* weight) const {
    if (GAN_UNLIKELY(has_fp32_weights())) {
      if (!in_row(j)) return {};
      return scale_of<kType>(params_.weight_bias, load_fp32_weights<kType>(weight, team_.pack(j)));
    }
    if (kOnePack) return scale_;
    return scale_of<kType>(params_.weight_bias, widen<kType>(weight_));
  }

  // h, which is residual_out, and its squares. The residual is what expect loaded.
  GAN_DEVICE Pack enter_residual(uint32_t row, uint32_t j, Pack a) {
    // The residual of an only pack beyond the row is zero, as the sum is.
    if ((kOnePack || in_row(j)) && !GAN_UNLIKELY(!has_residual())) a = add<kType>(residual_, a);
    add_squares(j, a);
    // After the team has been given the squares, which it waits for.
    if (in_row(j)) store_pack(params_.residual_out, row, j, a);
    return a;
  }

  // The sum of squares of the segment that the warp's packs j make up, to every block of the team.
  GAN_DEVICE void add_squares(uint32_t j, Pack pack) {
    const float segment = warp_sum(sum_of_squares<kType>(widen<kType>(pack)));
    const uint32_t lane = threadIdx.x % kWarpLanes;
    const uint32_t buffer = reductions_ % 2;
    float* own = &sums_.sum[buffer][team_.segment(j)];
    if (team_.cluster.blocks == 1) {
      if (lane == 0) *own = segment;
    } else {
      warp_sync();  // with the sum goes what all lanes have done
      if (lane < team_.cluster.blocks) store_counted(lane, own, segment, &sums_.received[buffer]);
    }
  }

  // rstd of the row, of which all packs have been given to add_squares. What does not need it is
  // done while the team waits for each other.
  template <bool kByThread, class Meanwhile>
  GAN_DEVICE float reduce(Meanwhile meanwhile) {
    if (kOnePack) scale_ = scale_of<kType>(params_.weight_bias, widen<kType>(weight_));
    if (kOnePack && kAhead) {
#pragma unroll
      for (float& at : scale_.at) at = computed(at);
    }
    meanwhile();
    const uint32_t buffer = reductions_ % 2;
    if (team_.cluster.blocks == 1) {
      block_sync();
    } else {
      if (threadIdx.x == 0) expect_bytes(&sums_.received[buffer], team_.segments() * sizeof(float));
      wait_for_bytes(&sums_.received[buffer], reductions_ / 2 % 2);
    }
    const float sum = sum_of_segments<kByThread>(sums_.sum[buffer], team_.segments());
    ++reductions_;
    return rstd_of(sum, hidden_, hidden_reciprocal_, eps_);
  }

  // A parameter, in a register from here on. The compiler would read it where it is used, from a
  // cache that takes longer than what is done with it; xor-ed with what it does not know, it does
  // not.
  GAN_DEVICE float held(float parameter) const {
    return computed(float_of(bits_of(parameter) ^ params_.zero));
  }

  const RowParams& params_;
  const Team& team_;
  SegmentSums& sums_;
  const float hidden_, hidden_reciprocal_, eps_;
  uint32_t reductions_ = 0;  // so far
  Pack residual_ = zero_pack();
  // Of the only pack: the weight, of T, loaded ahead of the reduction that it waits for, and
  // bias + weight.
  Pack weight_ = zero_pack();
  Floats<kType> scale_;
  RowPacks<kOnePack> packs_;
};

}  // namespace gan
