// The arithmetic that gpu.cuh promises, on a CPU: each function is one IEEE operation, or one
// rounding, so it gives the GPU's bits. To be compiled with -ffp-contract=off. It needs nothing
// else of the emulator.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "vectors.h"

#define GAN_DEVICE inline
#define GAN_UNLIKELY(condition) __builtin_expect((condition), false)

namespace gan {

inline float add_rn(float a, float b) { return a + b; }
inline float mul_rn(float a, float b) { return a * b; }
inline float div_rn(float a, float b) { return a / b; }
inline float sqrt_rn(float a) { return std::sqrt(a); }
inline float reciprocal_rn(float a) { return 1.0f / a; }
inline float fma_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline bool is_nan(float a) { return a != a; }
inline float computed(float value) { return value; }
template <class T>
T* computed(T* value) {
  return value;
}

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

// ---- the approximate root: the one result that differs from GPU to GPU ----

namespace emulator {

// Up to three units of the last place off, by what looks like chance: nothing may rely on it.
inline float rough_rsqrt(float a) {
  constexpr float kSmallestNormal = 0x1p-126f;
  if (std::fabs(a) < kSmallestNormal) return std::copysign(INFINITY, a);  // as .ftz has it
  const float root = 1.0f / std::sqrt(a);
  if (!std::isnormal(root)) return root;
  return float_of(bits_of(root) + (bits_of(a) * 2654435761u >> 16) % 7 - 3);
}

// A test may put its own here.
inline float (*approximate_rsqrt)(float) = rough_rsqrt;

}  // namespace emulator

inline float rsqrt_approximately(float a) { return emulator::approximate_rsqrt(a); }

// ---- 16-bit floats; two in a word, the one at the lower address in the lower half ----

namespace emulator {

// What the GPU rounds every NaN to, in both formats.
inline constexpr uint32_t kCanonicalNan16 = 0x7fff;
inline constexpr uint32_t kInfinity32 = 0x7f800000u;

inline uint32_t bf16_rn(float value) {
  const uint32_t bits = bits_of(value);
  if (is_nan(value)) return kCanonicalNan16;
  return (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
}

inline uint32_t fp16_rn(float value) {
  constexpr uint32_t kFirstToInfinity = 0x477ff000u;  // 65520, midway between 65504 and 65536
  constexpr uint32_t kFirstNormal = 0x38800000u;      // 2^-14
  constexpr uint32_t kMantissaDrop = 13;
  if (is_nan(value)) return kCanonicalNan16;
  const uint32_t bits = bits_of(value);
  const uint32_t sign = bits >> 16 & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude >= kFirstToInfinity) return sign | 0x7c00u;
  if (magnitude < kFirstNormal) {
    // The last place of 0.5 is 2^-24, that of fp16's subnormals: the addition rounds to it.
    return sign | (bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f));
  }
  const uint32_t rounded = magnitude + 0xfffu + (magnitude >> kMantissaDrop & 1u);
  return sign | ((rounded - (112u << 23)) >> kMantissaDrop);
}

inline float float_of_fp16(uint32_t half) {
  const uint32_t sign = (half & 0x8000u) << 16;
  const uint32_t exponent = half >> 10 & 31u, mantissa = half & 0x3ffu;
  if (exponent == 31) return float_of(sign | kInfinity32 | mantissa << 13);
  if (exponent == 0) {
    return float_of(sign | bits_of(static_cast<float>(mantissa) * 0x1p-24f));
  }
  return float_of(sign | (exponent + 112u) << 23 | mantissa << 13);
}

}  // namespace emulator

inline float2 floats_of_bf16x2(uint32_t word) {
  return {float_of(word << 16), float_of(word & 0xffff0000u)};
}
inline uint32_t bf16x2_rn(float2 value) {
  return emulator::bf16_rn(value.x) | emulator::bf16_rn(value.y) << 16;
}
inline float2 floats_of_fp16x2(uint32_t word) {
  return {emulator::float_of_fp16(word & 0xffffu), emulator::float_of_fp16(word >> 16)};
}
inline uint32_t fp16x2_rn(float2 value) {
  return emulator::fp16_rn(value.x) | emulator::fp16_rn(value.y) << 16;
}
inline uint32_t add_bf16x2(uint32_t a, uint32_t b) {
  const float2 f = floats_of_bf16x2(a), g = floats_of_bf16x2(b);
  return bf16x2_rn({f.x + g.x, f.y + g.y});
}
inline uint32_t add_fp16x2(uint32_t a, uint32_t b) {
  const float2 f = floats_of_fp16x2(a), g = floats_of_fp16x2(b);
  return fp16x2_rn({f.x + g.x, f.y + g.y});
}

}  // namespace gan
