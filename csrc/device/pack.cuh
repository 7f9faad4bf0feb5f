// A pack is 16 bytes, what one thread loads at once: 8 elements of bf16 or fp16, 4 of fp32. Here is
// all that depends on the element type. To add a dtype: a DType (params.h), an Element, a
// launch_<dtype>.cu, and its lines in launch.cu.
#pragma once
#include "gpu.cuh"
#include "params.h"

namespace gan {

using Pack = uint4;

// Element<T>: how many of T a pack holds, its fp32 values, and their rounding (to nearest even)
// back to T.
template <DType kType>
struct Element;

template <>
struct Element<DType::kBFloat16> {
  static constexpr uint32_t kPerPack = 8;
  static GAN_DEVICE void widen_word(uint32_t word, float* out) {
    const float2 two = floats_of_bf16x2(word);
    out[0] = two.x, out[1] = two.y;
  }
  static GAN_DEVICE uint32_t round_word(const float* in) { return bf16x2_rn({in[0], in[1]}); }
  static GAN_DEVICE uint32_t add_words(uint32_t a, uint32_t b) { return add_bf16x2(a, b); }
};

template <>
struct Element<DType::kFloat16> {
  static constexpr uint32_t kPerPack = 8;
  static GAN_DEVICE void widen_word(uint32_t word, float* out) {
    const float2 two = floats_of_fp16x2(word);
    out[0] = two.x, out[1] = two.y;
  }
  static GAN_DEVICE uint32_t round_word(const float* in) { return fp16x2_rn({in[0], in[1]}); }
  static GAN_DEVICE uint32_t add_words(uint32_t a, uint32_t b) { return add_fp16x2(a, b); }
};

template <>
struct Element<DType::kFloat32> {
  static constexpr uint32_t kPerPack = 4;
  static GAN_DEVICE void widen_word(uint32_t word, float* out) { out[0] = float_of(word); }
  static GAN_DEVICE uint32_t round_word(const float* in) { return bits_of(in[0]); }
  static GAN_DEVICE uint32_t add_words(uint32_t a, uint32_t b) {
    return bits_of(add_rn(float_of(a), float_of(b)));
  }
};

// The elements of a pack in fp32.
template <DType kType>
struct Floats {
  static constexpr uint32_t kCount = Element<kType>::kPerPack;
  static constexpr uint32_t kPerWord = kCount / 4;
  float at[kCount];
};

template <DType kType>
GAN_DEVICE Floats<kType> widen(Pack pack) {
  using E = Element<kType>;
  constexpr uint32_t kPerWord = Floats<kType>::kPerWord;
  Floats<kType> f;
  E::widen_word(pack.x, f.at);
  E::widen_word(pack.y, f.at + kPerWord);
  E::widen_word(pack.z, f.at + 2 * kPerWord);
  E::widen_word(pack.w, f.at + 3 * kPerWord);
  return f;
}

template <DType kType>
GAN_DEVICE Pack round_to_pack(const Floats<kType>& f) {
  using E = Element<kType>;
  constexpr uint32_t kPerWord = Floats<kType>::kPerWord;
  return {E::round_word(f.at), E::round_word(f.at + kPerWord), E::round_word(f.at + 2 * kPerWord),
          E::round_word(f.at + 3 * kPerWord)};
}

// T(a + b).
template <DType kType>
GAN_DEVICE Pack add(Pack a, Pack b) {
  using E = Element<kType>;
  return {E::add_words(a.x, b.x), E::add_words(a.y, b.y), E::add_words(a.z, b.z),
          E::add_words(a.w, b.w)};
}

// ---- the mark of an empty inbox word ----

// A NaN in all three dtypes, and a byte pattern that memset can write.
inline constexpr uint32_t kEmptyWord = 0xffffffffu;
// What is sent for a data word that happens to equal the mark: still a NaN in every element that
// was one.
inline constexpr uint32_t kOtherNanWord = 0x7fffffffu;

GAN_DEVICE Pack empty_pack() { return {kEmptyWord, kEmptyWord, kEmptyWord, kEmptyWord}; }
// Every element a NaN in all three dtypes.
GAN_DEVICE Pack nan_pack() { return {kOtherNanWord, kOtherNanWord, kOtherNanWord, kOtherNanWord}; }
GAN_DEVICE Pack zero_pack() { return {0, 0, 0, 0}; }

GAN_DEVICE uint32_t larger(uint32_t a, uint32_t b) { return a > b ? a : b; }
// The mark is the largest of words. A GPU takes three at a time, in a tree: comparisons would make
// a chain of predicates.
GAN_DEVICE uint32_t largest_word(Pack p) { return larger(larger(p.x, p.y), larger(p.z, p.w)); }
// All four words are tested: they arrive in no order.
GAN_DEVICE bool is_full(Pack p) { return largest_word(p) != kEmptyWord; }
GAN_DEVICE uint32_t sendable_word(uint32_t w) { return w == kEmptyWord ? kOtherNanWord : w; }
GAN_DEVICE Pack sendable(Pack p) {
  return {sendable_word(p.x), sendable_word(p.y), sendable_word(p.z), sendable_word(p.w)};
}

}  // namespace gan
