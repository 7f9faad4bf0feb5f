// Checks csrc/device/rstd.cuh, the file itself, on the CPU: each of its two functions against the
// operations that it stands for, where it has to be right. test_exact_arithmetic.py compiles and
// runs this.
//
//   main SEED    prints what was checked, or the first differences; 1 where there are any
#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
#include <vector>

#include "rstd.cuh"

namespace {

using gan::bits_of;
using gan::float_of;

constexpr uint32_t kMantissas = uint32_t{1} << 23;
constexpr uint32_t kExponents = 255;  // 0: subnormal
constexpr int kMaxErrorUlps = 8;      // of the approximate root; GPUs are within 2
constexpr uint32_t kMaxHidden = gan::kMaxHidden;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

int differences = 0;

bool same(float got, float want) {
  return bits_of(got) == bits_of(want) || (got != got && want != want);
}

__attribute__((noinline)) void report(const char* what, float a, float b, float got, float want) {
  if (++differences <= 10) std::printf("%s(%a, %a): %a instead of %a\n", what, a, b, got, want);
}

// ---- rstd_of: of eps 0, and a hidden that changes nothing but the exponent, the reciprocal root

void check_root(float v, float approximation, float want) {
  gan::next_approximation = approximation;
  const float hidden = v < 0x1p-60f ? 0x1p40f : 1.0f;  // smaller sums take the long way
  const float got = gan::rstd_of(v * hidden, hidden, 1.0f / hidden, 0.0f);
  if (!same(got, want)) report("rstd_of", v, approximation, got, want);
}

// With every approximation that is within kMaxErrorUlps.
uint64_t check_root_of_normal(float v) {
  const float want = 1.0f / std::sqrt(v);
  const uint32_t nearest = bits_of(static_cast<float>(1.0 / std::sqrt(static_cast<double>(v))));
  for (int ulps = -kMaxErrorUlps; ulps <= kMaxErrorUlps; ++ulps)
    check_root(v, float_of(nearest + ulps), want);
  return 2 * kMaxErrorUlps + 1;
}

uint64_t check_roots(std::mt19937& random) {
  uint64_t checked = 0;
  // Every mantissa, with an even and an odd exponent: [1, 4).
  for (uint32_t i = 0; i < 2 * kMantissas; ++i)
    checked += check_root_of_normal(float_of(bits_of(1.0f) + i));
  // Every exponent, with the mantissas at its ends and some others.
  for (uint32_t exponent = 1; exponent < kExponents; ++exponent) {
    const uint32_t first = exponent << 23;
    for (uint32_t i = 0; i < 1024; ++i) {
      checked += check_root_of_normal(float_of(first + i));
      checked += check_root_of_normal(float_of(first + kMantissas - 1 - i));
      checked += check_root_of_normal(float_of(first + random() % kMantissas));
    }
  }
  // What has no root, or no approximation that is one: whatever the GPU says of it.
  std::vector<float> others = {0.0f, -0.0f, kInfinity, -kInfinity, kNan, -1.0f, -0x1p-149f};
  for (uint32_t bits = 1; bits < kMantissas; bits += 1 + random() % 1024)  // subnormal
    others.push_back(float_of(bits));
  for (const float v : others) {
    const float want = 1.0f / std::sqrt(v + 0.0f);  // eps makes a zero of -0.0
    for (const float approximation : {0.0f, 1.0f, 0x1p74f, kInfinity, -kInfinity, kNan, want}) {
      check_root(v, approximation, want);
      ++checked;
    }
  }
  return checked;
}

// ---- divide_by_hidden, and rstd_of with it

void check_quotient(float sum, float hidden, float hidden_reciprocal) {
  const float want = sum / hidden;
  if (sum > 0x1p-60f && sum < 0x1p100f) {
    const float got = gan::divide_by_hidden(sum, hidden, hidden_reciprocal);
    if (!same(got, want)) report("divide_by_hidden", sum, hidden, got, want);
  }
  // A negative one is refused where calls are checked; here it makes roots of nothing.
  for (const float eps : {0.0f, 1e-6f, 0x1p-149f, 0x1p101f, -1e-6f}) {
    const float v = want + eps;
    const float rstd_want = 1.0f / std::sqrt(v);
    gan::next_approximation = static_cast<float>(1.0 / std::sqrt(static_cast<double>(v)));
    const float rstd = gan::rstd_of(sum, hidden, hidden_reciprocal, eps);
    if (!same(rstd, rstd_want)) report("rstd_of", sum, eps, rstd, rstd_want);
  }
}

uint64_t check_quotients(std::mt19937& random) {
  constexpr uint32_t kSums = 4096;
  const std::vector<float> ends = {0.0f,
                                   -0.0f,
                                   -1.0f,
                                   0x1p-149f,
                                   0x1p-126f,
                                   0x1p-60f,
                                   0x1.000002p-60f,
                                   0x1p-59f,
                                   0x1p99f,
                                   0x1p100f,
                                   0x1.fffffep99f,
                                   0x1.000002p100f,
                                   0x1.fffffep127f,
                                   kInfinity,
                                   -kInfinity,
                                   kNan};
  uint64_t checked = 0;
  for (uint32_t hidden = 4; hidden <= kMaxHidden; hidden += 4) {
    const float divisor = static_cast<float>(hidden);
    const float reciprocal = 1.0f / divisor;
    for (const float sum : ends) check_quotient(sum, divisor, reciprocal);
    for (uint32_t i = 0; i < kSums; ++i) {
      // Any bits: half of them in the range of the short way.
      check_quotient(float_of(random()), divisor, reciprocal);
      const uint32_t mantissa = random() % kMantissas;
      check_quotient(float_of(bits_of(1.0f) + mantissa), divisor, reciprocal);
      // Where it is hard: quotients half-way between two floats, as near as sums get.
      const double half_way = 1.0 + (mantissa + 0.5) / kMantissas;
      const uint32_t hard = bits_of(static_cast<float>(half_way * divisor));
      for (int ulps = -1; ulps <= 1; ++ulps)
        check_quotient(float_of(hard + ulps), divisor, reciprocal);
    }
    checked += ends.size() + 5 * kSums;
  }
  return checked;
}

}  // namespace

int main(int count, char** arguments) {
  std::mt19937 random(count > 1 ? std::strtoul(arguments[1], nullptr, 10) : 0);
  std::printf("%" PRIu64 " roots\n", check_roots(random));
  std::printf("%" PRIu64 " quotients\n", check_quotients(random));
  std::printf("%d differences\n", differences);
  return differences == 0 ? 0 : 1;
}
