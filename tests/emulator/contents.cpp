// What a case's buffers hold: before a repeat by chance, after it by the contract.
#include <algorithm>
#include <cstring>
#include <iomanip>
#include <sstream>

#include "contract.h"
#include "harness.h"
#include "kernels.h"

namespace gan::testing {
namespace {

constexpr uint32_t kEmptyInboxWord = 0xffffffffu;
// Of outputs: a finite number in all dtypes, so that a NaN that was not written shows too.
constexpr uint8_t kPoison = 0x42;

// ---- random numbers of a dtype ----

// Of magnitudes that differ, so that the order of a sum shows.
uint32_t random_number(DType dtype, Random& random) {
  const uint32_t digits = static_cast<uint32_t>(random.next());
  const uint32_t sign = digits >> 31, exponent = random.below(8);
  switch (dtype) {
    case DType::kBFloat16:
      return sign << 15 | (122 + exponent) << 7 | (digits & 0x7f);
    case DType::kFloat16:
      return sign << 15 | (10 + exponent) << 10 | (digits & 0x3ff);
    case DType::kFloat32:
      break;
  }
  return sign << 31 | (122 + exponent) << 23 | (digits & 0x7fffff);
}

uint32_t special_number(DType dtype, Random& random) {
  const bool half = dtype == DType::kFloat16, single = dtype == DType::kFloat32;
  const uint32_t sign_bit = single ? 31 : 15, sign = random.below(2) << sign_bit;
  const uint32_t infinity = half ? 0x7c00 : single ? 0x7f800000 : 0x7f80;
  switch (random.below(8)) {
    case 0:
      return sign | infinity;
    case 1:
      return sign | infinity | 1;  // a NaN
    case 2:
      return sign | (infinity - 1);  // the largest number
    case 3:
    case 4:
      return sign | (1 + random.below(100));  // subnormal
    default:
      return sign;  // zero
  }
}

void fill_randomly(Bytes& bytes, DType dtype, Specials specials, Random& random) {
  const uint32_t element = bytes_of_element(dtype);
  for (size_t pack = 0; pack < bytes.size(); pack += kPackBytes) {
    const bool special =
        specials != Specials::kNone && random.one_in(specials == Specials::kFew ? 32 : 4);
    const bool empty_words = special && random.one_in(3);
    const uint32_t which = random.below(16);
    for (size_t at = pack; at < pack + kPackBytes; at += element) {
      const bool chosen = special && (which == 0 || (at - pack) / element == which % 8);
      const uint32_t bits = chosen ? special_number(dtype, random) : random_number(dtype, random);
      std::memcpy(&bytes[at], &bits, element);
      if (empty_words && (at - pack) % 4 == 0 && random.one_in(2))
        std::memcpy(&bytes[at & ~size_t{3}], &kEmptyInboxWord, element);
    }
    if (!empty_words) continue;
    // Whole words, which the elements above may have half overwritten.
    for (size_t at = pack; at < pack + kPackBytes; at += 4) {
      if (random.one_in(2)) std::memcpy(&bytes[at], &kEmptyInboxWord, 4);
    }
  }
}

uint32_t bits_at(DType dtype, const uint8_t* row, uint32_t index) {
  uint32_t bits = 0;
  std::memcpy(&bits, row + index * bytes_of_element(dtype), bytes_of_element(dtype));
  return bits;
}

const uint8_t* row_of(const Contents& contents, uint32_t rank, uint32_t buffer, uint64_t offset) {
  return buffer == kNoBuffer ? nullptr : contents[rank][buffer].data() + offset;
}

}  // namespace

Contents random_contents(const Case& c, uint32_t repeat) {
  Contents contents(c.ranks);
  Random random(c.seed * 31 + repeat);
  for (uint32_t rank = 0; rank < c.ranks; ++rank) {
    for (const Buffer& buffer : c.buffers) {
      Bytes bytes(buffer.bytes, kPoison);
      if (buffer.is_input) fill_randomly(bytes, c.dtype, c.specials, random);
      contents[rank].push_back(std::move(bytes));
    }
  }
  return contents;
}

void apply(const Case& c, const Call& call, Contents& contents) {
  const uint64_t row_bytes = row_bytes_of(call);
  const bool exchanges = kKernels[call.kernel].exchanges();
  Epilogue epilogue{c.dtype, hidden_of(c, call), call.weights_fp32, nullptr, nullptr, c.eps,
                    c.bias};
  // A row of all ranks' sums before any rank's outputs, which may be its x.
  std::vector<Bytes> norm_out(c.ranks, Bytes(row_bytes)), residual_out = norm_out;
  for (uint64_t row = 0; row < call.rows; ++row) {
    const uint64_t offset = row * row_bytes;
    for (uint32_t rank = 0; rank < c.ranks; ++rank) {
      std::vector<const void*> x;
      for (uint32_t r = 0; r < c.ranks; ++r) {
        if (exchanges || r == rank) x.push_back(row_of(contents, r, call.x, offset));
      }
      epilogue.weight = row_of(contents, rank, call.weight, 0);
      epilogue.post_weight = row_of(contents, rank, call.post_weight, 0);
      contract_row(epilogue, x, row_of(contents, rank, call.residual, offset),
                   norm_out[rank].data(), residual_out[rank].data());
    }
    for (uint32_t rank = 0; rank < c.ranks; ++rank) {
      auto& buffers = contents[rank];
      std::memcpy(buffers[call.norm_out].data() + offset, norm_out[rank].data(), row_bytes);
      std::memcpy(buffers[call.residual_out].data() + offset, residual_out[rank].data(), row_bytes);
    }
  }
}

std::string difference(const Case& c, uint32_t buffer, const uint8_t* got, const Bytes& expected) {
  if (std::memcmp(got, expected.data(), expected.size()) == 0) return "";
  const uint32_t bytes = bytes_of_element(c.dtype);
  const auto elements = static_cast<uint32_t>(expected.size() / bytes);
  uint32_t first = elements, count = 0;
  for (uint32_t i = 0; i < elements; ++i) {
    if (same_element(c.dtype, got, expected.data(), i)) continue;
    first = std::min(first, i);
    ++count;
  }
  if (count == 0) return "";
  std::ostringstream text;
  text << "buffer " << buffer << ": " << count << " of " << elements
       << " elements differ; the first, " << first;
  // Of the last call that has written there.
  for (auto call = c.calls.rbegin(); call != c.calls.rend(); ++call) {
    if (buffer != call->norm_out && buffer != call->residual_out) continue;
    const uint32_t hidden = hidden_of(c, *call);
    if (first / hidden >= call->rows) continue;
    text << " (call " << c.calls.rend() - call - 1 << ", "
         << (buffer == call->norm_out ? "norm_out" : "residual_out") << ", row " << first / hidden
         << ", element " << first % hidden << ")";
    break;
  }
  text << ", is 0x" << std::hex << bits_at(c.dtype, got, first) << " instead of 0x"
       << bits_at(c.dtype, expected.data(), first);
  return text.str();
}

}  // namespace gan::testing
