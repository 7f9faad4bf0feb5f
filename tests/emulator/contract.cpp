#include "contract.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>

namespace gan::testing {
namespace {

constexpr uint32_t kLanes = 32;

uint32_t bits_of_float(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}
float float_of_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// ---- 16-bit formats ----

// A format of 1 sign bit, so many exponent bits and the rest mantissa.
struct Format {
  int exponent_bits, mantissa_bits;

  int bias() const { return (1 << (exponent_bits - 1)) - 1; }
  uint32_t infinity() const { return ((1u << exponent_bits) - 1) << mantissa_bits; }

  double value_of(uint32_t bits) const {
    const bool negative = bits >> (exponent_bits + mantissa_bits) != 0;
    const uint32_t magnitude = bits & ((1u << (exponent_bits + mantissa_bits)) - 1);
    double value;
    if (magnitude >= infinity()) {
      value = magnitude == infinity() ? INFINITY : NAN;
    } else {
      const int exponent = static_cast<int>(magnitude >> mantissa_bits);
      const uint32_t mantissa = magnitude & ((1u << mantissa_bits) - 1);
      const uint32_t digits = exponent == 0 ? mantissa : mantissa | 1u << mantissa_bits;
      value = std::ldexp(digits, (exponent == 0 ? 1 : exponent) - bias() - mantissa_bits);
    }
    return std::copysign(value, negative ? -1.0 : 1.0);
  }

  // To nearest, ties to even. In double, a power of two apart from the units that are counted, all
  // is exact; rint rounds.
  uint32_t bits_of(double value) const {
    const uint32_t sign = (std::signbit(value) ? 1u : 0u) << (exponent_bits + mantissa_bits);
    if (std::isnan(value)) return sign | infinity() | 1u << (mantissa_bits - 1);
    if (std::isinf(value)) return sign | infinity();
    if (value == 0) return sign;
    int exponent;
    std::frexp(value, &exponent);  // |value| in [2^(exponent - 1), 2^exponent)
    const int lowest = 1 - bias();
    const int unit = std::max(exponent - 1, lowest) - mantissa_bits;
    // Units of the last place: of a subnormal number fewer than 2^mantissa_bits. What rounds up to
    // the next power of two carries into the exponent, and beyond the largest into infinity.
    const auto units = static_cast<uint32_t>(std::rint(std::ldexp(std::fabs(value), -unit)));
    const int above_lowest = unit + mantissa_bits - lowest;
    const uint64_t magnitude = (static_cast<uint64_t>(above_lowest) << mantissa_bits) + units;
    return sign | static_cast<uint32_t>(std::min<uint64_t>(magnitude, infinity()));
  }
};

constexpr Format kBFloat16Format{8, 7}, kFloat16Format{5, 10};

const Format& format_of(DType dtype) {
  return dtype == DType::kBFloat16 ? kBFloat16Format : kFloat16Format;
}

// ---- rstd ----

float sum_by_xor_shuffle(std::array<float, kLanes> lanes) {
  for (uint32_t mask = kLanes / 2; mask != 0; mask /= 2) {
    const std::array<float, kLanes> before = lanes;
    for (uint32_t lane = 0; lane < kLanes; ++lane) lanes[lane] = before[lane] + before[lane ^ mask];
  }
  return lanes[0];
}

float sum_of_squares(DType dtype, const std::vector<float>& row) {
  const uint32_t hidden = static_cast<uint32_t>(row.size());
  const uint32_t pack = 16 / bytes_of_element(dtype);
  const uint32_t segment = kLanes * pack;
  std::array<float, kLanes> of_lane{};
  for (uint32_t first = 0; first < hidden; first += segment) {
    std::array<float, kLanes> of_pack{};
    for (uint32_t i = first; i < std::min(first + segment, hidden); ++i) {
      float& sum = of_pack[(i - first) / pack];
      const float square = row[i] * row[i];
      sum = sum + square;
    }
    float& lane = of_lane[first / segment % kLanes];
    lane = lane + sum_by_xor_shuffle(of_pack);
  }
  return sum_by_xor_shuffle(of_lane);
}

// T( (v * rstd(v)) * (bias + weight) )
void normalise(const Epilogue& epilogue, const std::vector<float>& v, const void* weight,
               void* out) {
  const DType weight_dtype = epilogue.weights_fp32 ? DType::kFloat32 : epilogue.dtype;
  const std::vector<float> weights = widen(weight_dtype, weight, epilogue.hidden);
  const float mean = sum_of_squares(epilogue.dtype, v) / static_cast<float>(epilogue.hidden);
  const float root = std::sqrt(mean + epilogue.eps);
  const float rstd = 1.0f / root;
  std::vector<float> scaled(epilogue.hidden);
  for (uint32_t i = 0; i < epilogue.hidden; ++i) {
    const float normal = v[i] * rstd;
    const float scale = epilogue.bias + weights[i];
    scaled[i] = normal * scale;
  }
  round_to(epilogue.dtype, scaled, out);
}

std::vector<float> rounded(DType dtype, const std::vector<float>& values) {
  std::vector<uint8_t> row(values.size() * bytes_of_element(dtype));
  round_to(dtype, values, row.data());
  return widen(dtype, row.data(), static_cast<uint32_t>(values.size()));
}

}  // namespace

uint32_t bytes_of_element(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

std::vector<float> widen(DType dtype, const void* row, uint32_t hidden) {
  std::vector<float> values(hidden);
  for (uint32_t i = 0; i < hidden; ++i) {
    if (dtype == DType::kFloat32) {
      uint32_t bits;
      std::memcpy(&bits, static_cast<const uint8_t*>(row) + 4 * i, 4);
      values[i] = float_of_bits(bits);
    } else {
      uint16_t bits;
      std::memcpy(&bits, static_cast<const uint8_t*>(row) + 2 * i, 2);
      values[i] = static_cast<float>(format_of(dtype).value_of(bits));
    }
  }
  return values;
}

void round_to(DType dtype, const std::vector<float>& values, void* row) {
  for (size_t i = 0; i < values.size(); ++i) {
    if (dtype == DType::kFloat32) {
      const uint32_t bits = bits_of_float(values[i]);
      std::memcpy(static_cast<uint8_t*>(row) + 4 * i, &bits, 4);
    } else {
      const auto bits = static_cast<uint16_t>(format_of(dtype).bits_of(values[i]));
      std::memcpy(static_cast<uint8_t*>(row) + 2 * i, &bits, 2);
    }
  }
}

void contract_row(const Epilogue& epilogue, const std::vector<const void*>& x, const void* residual,
                  void* norm_out, void* residual_out) {
  const DType dtype = epilogue.dtype;
  std::vector<float> sum = widen(dtype, x[0], epilogue.hidden);
  for (size_t r = 1; r < x.size(); ++r) {
    const std::vector<float> next = widen(dtype, x[r], epilogue.hidden);
    for (uint32_t i = 0; i < epilogue.hidden; ++i) sum[i] = sum[i] + next[i];
  }
  std::vector<float> h = rounded(dtype, sum);
  if (residual != nullptr) {
    const std::vector<float> skipped = widen(dtype, residual, epilogue.hidden);
    if (epilogue.post_weight != nullptr) {
      std::vector<uint8_t> p(h.size() * bytes_of_element(dtype));
      normalise(epilogue, h, epilogue.post_weight, p.data());
      h = widen(dtype, p.data(), epilogue.hidden);
    }
    for (uint32_t i = 0; i < epilogue.hidden; ++i) h[i] = skipped[i] + h[i];
    h = rounded(dtype, h);
  }
  round_to(dtype, h, residual_out);
  normalise(epilogue, h, epilogue.weight, norm_out);
}

bool is_nan_element(DType dtype, const void* row, uint32_t index) {
  const uint8_t* at = static_cast<const uint8_t*>(row) + index * bytes_of_element(dtype);
  return std::isnan(widen(dtype, at, 1)[0]);
}

bool same_element(DType dtype, const void* a, const void* b, uint32_t index) {
  const uint32_t bytes = bytes_of_element(dtype), offset = index * bytes;
  const bool equal = std::memcmp(static_cast<const uint8_t*>(a) + offset,
                                 static_cast<const uint8_t*>(b) + offset, bytes) == 0;
  return equal || (is_nan_element(dtype, a, index) && is_nan_element(dtype, b, index));
}

}  // namespace gan::testing

// For test_emulator.py, by way of ctypes: all rows of all ranks' x, [ranks, rows, hidden].
extern "C" __attribute__((visibility("default"))) void gan_contract(
    int32_t dtype, uint32_t ranks, uint32_t rows, uint32_t hidden, const uint8_t* x,
    const uint8_t* residual, const void* weight, const void* post_weight, int32_t weights_fp32,
    float eps, float bias, uint8_t* norm_out, uint8_t* residual_out) {
  using namespace gan::testing;
  const Epilogue epilogue{
      gan::DType{dtype}, hidden, weights_fp32 != 0, weight, post_weight, eps, bias};
  const size_t row_bytes = size_t{hidden} * bytes_of_element(epilogue.dtype);
  for (uint32_t row = 0; row < rows; ++row) {
    std::vector<const void*> of_rank;
    for (uint32_t r = 0; r < ranks; ++r)
      of_rank.push_back(x + (size_t{r} * rows + row) * row_bytes);
    const size_t offset = row * row_bytes;
    contract_row(epilogue, of_rank, residual == nullptr ? nullptr : residual + offset,
                 norm_out + offset, residual_out + offset);
  }
}
