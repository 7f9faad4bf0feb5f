// 1 / sqrt(sum / hidden + eps) of the contract: four operations, each correctly rounded, in fewer
// steps than the compiler's, and one branch for all that they do not do. tests/cpu/exact_arithmetic
// checks them on the CPU, the root for every mantissa.
#pragma once
#include "gpu.cuh"
#include "params.h"

namespace gan {

// sum / hidden, where nothing over- or underflows on the way. hidden_reciprocal is 1 / hidden
// correctly rounded, so one step of Newton's on the quotient gives the right one (Markstein,
// Computation of elementary functions on the IBM RISC System/6000 processor, IBM J. Res. Dev. 34,
// 1990).
GAN_DEVICE float divide_by_hidden(float sum, float hidden, float hidden_reciprocal) {
  const float quotient = mul_rn(sum, hidden_reciprocal);
  const float remainder = fma_rn(-hidden, quotient, sum);
  return fma_rn(remainder, hidden_reciprocal, quotient);
}

// Root and reciprocal are each correctly rounded: one approximation serves both. Whatever its last
// three bits are, the steps end at the same result.
GAN_DEVICE float rstd_of(float sum, float hidden, float hidden_reciprocal, float eps) {
  const float v = add_rn(divide_by_hidden(sum, hidden, hidden_reciprocal), eps);
  const float rough = rsqrt_approximately(v);
  // Newton's step on the reciprocal root, then one on the root by its exact remainder.
  const float y = fma_rn(rough, fma_rn(mul_rn(-0.5f, rough), mul_rn(v, rough), 0.5f), rough);
  const float near_root = mul_rn(v, y);
  const float root = fma_rn(fma_rn(-near_root, near_root, v), mul_rn(0.5f, y), near_root);
  // Two of Newton's on 1 / root. They miss where the mantissa is all ones, and nowhere else.
  const float near_rstd = fma_rn(fma_rn(-root, y, 1.0f), y, y);
  const float rstd = fma_rn(fma_rn(-root, near_rstd, 1.0f), near_rstd, near_rstd);
  constexpr uint32_t kMantissa = 0x7fffff;
  const bool in_range = (sum > 0x1p-60f) & (sum < 0x1p100f) & (v > 0x1p-100f) & (v < 0x1p100f) &
                        ((bits_of(root) & kMantissa) != kMantissa);
  if (GAN_UNLIKELY(!in_range)) return reciprocal_rn(sqrt_rn(add_rn(div_rn(sum, hidden), eps)));
  return rstd;
}

}  // namespace gan
