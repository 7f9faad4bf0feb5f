// In the place of csrc/device/two_shot.cuh: the same name, and nothing in it.
#pragma once
#include "device/params.h"
#include "device/row_norm.cuh"

namespace gan {

template <DType kType, uint32_t kRanks, bool kOnePack, Form kForm>
void two_shot(FusedParams) {}

}  // namespace gan
