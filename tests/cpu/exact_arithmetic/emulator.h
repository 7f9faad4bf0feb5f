// What csrc/device/rstd.cuh needs of gpu.cuh, on a CPU. Only the approximate root differs from GPU
// to GPU; here it is whatever the test says.
#pragma once
#include "../../emulator/arithmetic.h"

namespace gan {

inline float next_approximation = 0.0f;
inline const bool approximation_is_replaced =
    (emulator::approximate_rsqrt = [](float) { return next_approximation; }) != nullptr;

}  // namespace gan
