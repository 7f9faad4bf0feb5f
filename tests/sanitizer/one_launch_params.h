// What kernels are given when one launch has the blocks of all ranks: the parameters of each, of
// which a block takes those of its rank, blockIdx.y. For params.h, where GAN_ONE_LAUNCH is defined:
// so the kernels, and the table that chooses them, are the product's, to the letter.
#pragma once
#include "device/params.h"

namespace gan {

template <class Params>
struct OfRanks {
  Params of[kMaxRanks];
#ifdef __CUDACC__
  __device__ __forceinline__ operator const Params&() const { return of[blockIdx.y]; }
#endif
};

struct FusedParams {
  OfRanks<RowParams> row;
  Trigger trigger;
  OfRanks<ExchangeParams> exchange;
  OfRanks<TwoShotParams> two_shot;
};

struct DebugParams {
  OfRanks<ExchangeParams> exchange;
  OfRanks<CallSummary> call;
  OfRanks<DebugReport*> report;
};

struct LocalNormParams {
  OfRanks<RowParams> row;
  Trigger trigger;
};

static_assert(sizeof(FusedParams) <= 4096, "a kernel's parameters, on every GPU");

}  // namespace gan
