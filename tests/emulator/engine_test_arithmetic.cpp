// The tests of arithmetic.h.
#include <cmath>

#include "engine_test.h"

namespace gan::emulator {

void test_arithmetic() {
  // Both formats have their values in the order of their bits.
  const auto check_rounding = [](uint32_t bits, uint32_t infinity, float (*widen)(uint32_t),
                                 uint32_t (*round)(float)) {
    for (uint32_t sign : {0u, 0x8000u}) {
      for (bits = 0; bits + 1 < infinity; ++bits) {
        const float low = widen(sign | bits), high = widen(sign | (bits + 1));
        const auto middle = static_cast<float>((double{low} + double{high}) / 2);
        const uint32_t even = bits % 2 == 0 ? bits : bits + 1;
        check(round(low) == (sign | bits), "a value is itself");
        check(round(middle) == (sign | even), "a tie goes to the even one");
        check(round(std::nextafter(middle, low)) == (sign | bits), "down");
        check(round(std::nextafter(middle, high)) == (sign | (bits + 1)), "up");
      }
      check(round(widen(sign | infinity)) == (sign | infinity), "infinity");
    }
    check(round(NAN) == 0x7fff && round(-NAN) == 0x7fff, "NaN is canonical");
    check(is_nan(widen(0x7fff)) && is_nan(widen(0xffff)), "and stays NaN");
  };
  test("fp16 rounds to nearest even", [&] {
    check_rounding(0, 0x7c00, float_of_fp16, fp16_rn);
    check(fp16_rn(65520.0f) == 0x7c00 && fp16_rn(65519.0f) == 0x7bff, "overflow");
    check(fp16_rn(0x1p-25f) == 0 && fp16_rn(0x1.8p-25f) == 1, "underflow");
  });
  test("bf16 rounds to nearest even", [&] {
    check_rounding(0, 0x7f80, [](uint32_t bits) { return floats_of_bf16x2(bits).x; }, bf16_rn);
    check(bf16_rn(0x1.ffp127f) == 0x7f80 && bf16_rn(0x1.fe8p127f) == 0x7f7f, "overflow");
  });
  test("two in a word: the lower half is the first", [] {
    check(bf16x2_rn({1.0f, 2.0f}) == 0x40003f80u, "bf16");
    check(fp16x2_rn({1.0f, 2.0f}) == 0x40003c00u, "fp16");
    check(floats_of_fp16x2(0x40003c00u).y == 2.0f, "and back");
  });
  test("the approximate root is near, and replaceable", [] {
    bool is_exact = true;
    for (float v = 0.1f; v < 10.0f; v *= 1.01f) {
      const float exact = 1.0f / std::sqrt(v);
      const float rough = rsqrt_approximately(v);
      check(std::fabs(rough - exact) < exact * 0x1p-20f, "near");
      is_exact &= rough == exact;
    }
    check(!is_exact, "not exact");
    const auto before = approximate_rsqrt;
    approximate_rsqrt = [](float) { return 3.0f; };
    check(rsqrt_approximately(1.0f) == 3.0f, "replaced");
    approximate_rsqrt = before;
  });
}

}  // namespace gan::emulator
