// What csrc/device/rstd.cuh needs of gpu.cuh, on a CPU: each function is one IEEE operation, so it
// gives the GPU's bits. Only the approximate root differs from GPU to GPU; here it is whatever the
// test says.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#define GAN_DEVICE inline
#define GAN_UNLIKELY(condition) __builtin_expect((condition), false)

namespace gan {

inline float next_approximation = 0.0f;  // what rsqrt_approximately returns

inline uint32_t bits_of(float a) {
  uint32_t bits;
  std::memcpy(&bits, &a, sizeof(bits));
  return bits;
}
inline float float_of(uint32_t bits) {
  float a;
  std::memcpy(&a, &bits, sizeof(a));
  return a;
}

inline float mul_rn(float a, float b) { return a * b; }
inline float div_rn(float a, float b) { return a / b; }
inline float sqrt_rn(float a) { return std::sqrt(a); }
inline float reciprocal_rn(float a) { return 1.0f / a; }
inline float fma_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline float rsqrt_approximately(float) { return next_approximation; }

}  // namespace gan
