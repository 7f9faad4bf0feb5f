#include "runner.h"

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <utility>

#include "../emulator/contract.h"
#include "../emulator/random.h"
#include "device/inbox.h"
#include "host/exchange_setup.h"

namespace gan::testing {
namespace {

using Bytes = std::vector<uint8_t>;
using emulator::Random;

// Nobody is late in a launch that has all ranks, however slow a tool makes it.
constexpr uint64_t kTimeoutNs = 60'000'000'000;
// Long enough for those that are there to see each other's rows.
constexpr uint64_t kShortTimeoutNs = 250'000'000;
constexpr uint8_t kPoison = 0x42;  // of outputs: a finite number in all dtypes
constexpr uint8_t kEmptyByte = 0xff;
constexpr float kEps = 1e-6f, kBias = 1.0f;

// Of magnitudes that differ, so that the order of a sum shows.
void fill_randomly(Bytes& bytes, DType dtype, Random& random) {
  const uint32_t element = bytes_of_element(dtype);
  for (size_t at = 0; at < bytes.size(); at += element) {
    const auto digits = static_cast<uint32_t>(random.next());
    const uint32_t sign = digits >> 31, exponent = random.below(8);
    uint32_t bits = sign << 31 | (122 + exponent) << 23 | (digits & 0x7fffff);
    if (dtype == DType::kBFloat16) bits = sign << 15 | (122 + exponent) << 7 | (digits & 0x7f);
    if (dtype == DType::kFloat16) bits = sign << 15 | (10 + exponent) << 10 | (digits & 0x3ff);
    std::memcpy(&bytes[at], &bits, element);
  }
}

// A device's memory. What is put there lies at its end, so that whoever reads or writes beyond it
// is beyond the allocation.
class Memory {
 public:
  Memory(Device& device, uint64_t bytes)
      : device_(&device), bytes_(bytes), begin_(device.allocate(bytes)) {}
  Memory(Memory&& other) noexcept
      : device_(other.device_),
        bytes_(other.bytes_),
        begin_(std::exchange(other.begin_, nullptr)) {}
  Memory& operator=(Memory&&) = delete;
  ~Memory() {
    if (begin_ != nullptr) device_->free(begin_);
  }

  uint64_t bytes() const { return bytes_; }
  uint8_t* begin() const { return begin_; }
  uint8_t* last(uint64_t bytes) const { return begin_ + bytes_ - bytes; }
  uint8_t* put(const Bytes& from) const {
    device_->upload(last(from.size()), from.data(), from.size());
    return last(from.size());
  }
  uint8_t* poison(uint64_t bytes) const {
    device_->fill(last(bytes), kPoison, bytes);
    return last(bytes);
  }
  Bytes get(const uint8_t* from, uint64_t bytes) const {
    Bytes to(bytes);
    device_->download(to.data(), from, bytes);
    return to;
  }

 private:
  Device* device_;
  uint64_t bytes_;
  uint8_t* begin_;
};

class HostWord {
 public:
  explicit HostWord(Device& device) : device_(&device), word_(device.allocate_host_word()) {}
  HostWord(HostWord&& other) noexcept
      : device_(other.device_), word_(std::exchange(other.word_, nullptr)) {}
  HostWord& operator=(HostWord&&) = delete;
  ~HostWord() {
    if (word_ != nullptr) device_->free_host_word(word_);
  }

  uint64_t* address() const { return word_; }
  uint64_t value() const { return *word_; }

 private:
  Device* device_;
  uint64_t* word_;
};

struct Rank {
  Rank(Device& device, uint64_t inbox_bytes, uint64_t rows_bytes)
      : inbox(device, inbox_bytes),
        x(device, rows_bytes),
        residual(device, rows_bytes),
        norm_out(device, rows_bytes),
        residual_out(device, rows_bytes),
        host_failure(device) {}

  Memory inbox, x, residual, norm_out, residual_out;
  HostWord host_failure;
  ExchangeParams exchange{};
  // Of the call that is made:
  Bytes sent;
  uint8_t *norm_out_at = nullptr, *residual_out_at = nullptr;
};

// What all ranks have alike, and what they are to give.
struct Call {
  CallShape shape;
  Bytes residual, weight, post_weight;
  std::vector<Bytes> norm_out, residual_out;  // by rank
};

class Run {
 public:
  Run(Device& device, const Case& c, uint64_t seed)
      : device_(device),
        case_(c),
        calls_(calls_of(c)),
        random_(seed),
        weight_(device, most_row_bytes() * weight_factor()),
        post_weight_(device, most_row_bytes() * weight_factor()) {
    const uint64_t inbox_bytes = kHeaderBytes + kStages * (c.ranks - 1) * area_bytes();
    layout_ = InboxLayout::of(c.ranks, inbox_bytes);
    const uint64_t rows_bytes = most_rows_bytes();
    std::vector<uint8_t*> inboxes;
    for (uint32_t r = 0; r < c.ranks; ++r) {
      ranks_.emplace_back(device, inbox_bytes, rows_bytes);
      inboxes.push_back(ranks_[r].inbox.begin());
      device.fill(inboxes[r], 0, kHeaderBytes);
      device.fill(inboxes[r] + kHeaderBytes, kEmptyByte, inbox_bytes - kHeaderBytes);
    }
    const uint64_t timeout = c.missing == kNobody ? kTimeoutNs : kShortTimeoutNs;
    for (uint32_t r = 0; r < c.ranks; ++r) {
      ranks_[r].exchange = exchange_params(layout_, r, inboxes, timeout_ticks_of(timeout),
                                           ranks_[r].host_failure.address());
    }
  }

  std::string run() {
    if (case_.missing != kNobody) return run_without_one();
    for (uint32_t i = 0; i < calls_.size(); ++i) {
      const Call call = new_call(calls_[i], i == 2);
      launch(call, all_ranks(), i == 1);
      for (uint32_t r = 0; r < case_.ranks; ++r) {
        std::string wrong = wrong_rows(call, r);
        if (wrong.empty()) wrong = wrong_inbox(r, case_.algorithm ? i + 1 : 0);
        if (!wrong.empty())
          return "call " + std::to_string(i) + ", rank " + std::to_string(r) + ": " + wrong;
      }
    }
    return "";
  }

 private:
  // ---- sizes ----

  uint32_t element_bytes() const { return bytes_of_element(case_.dtype); }
  uint64_t weight_factor() const { return case_.weights_fp32 ? 4 / element_bytes() : 1; }
  static uint64_t row_bytes_of(const CallShape& call) {
    return uint64_t{call.row_packs} * kPackBytes;
  }
  uint32_t hidden_of(const CallShape& call) const {
    return call.row_packs * (kPackBytes / element_bytes());
  }
  template <class Size>
  uint64_t most(Size size_of) const {
    uint64_t most = 0;
    for (const CallShape& call : calls_) most = std::max<uint64_t>(most, size_of(call));
    return most;
  }
  uint64_t most_row_bytes() const { return most(row_bytes_of); }
  uint64_t most_rows_bytes() const {
    return most([](const CallShape& call) { return call.rows * row_bytes_of(call); });
  }
  // No larger than it must be.
  uint64_t area_bytes() const {
    return most([this](const CallShape& call) {
      const bool two_shot = case_.algorithm == Algorithm::kTwoShot;
      return bytes_of_area(case_.ranks, two_shot ? 0 : call.rows, two_shot ? call.rows : 0,
                           row_bytes_of(call));
    });
  }
  std::vector<uint32_t> all_ranks() const {
    std::vector<uint32_t> ranks;
    for (uint32_t r = 0; r < case_.ranks; ++r) ranks.push_back(r);
    return ranks;
  }

  // ---- calls ----

  Bytes random_bytes(uint64_t bytes, DType dtype) {
    Bytes values(bytes);
    fill_randomly(values, dtype, random_);
    return values;
  }

  // `has_nans`: the first pack of row 0 has words that are the mark of an empty inbox.
  Call new_call(const CallShape& shape, bool has_nans) {
    Call call{shape, {}, {}, {}, {}, {}};
    const uint64_t row_bytes = row_bytes_of(shape), bytes = shape.rows * row_bytes;
    for (Rank& rank : ranks_) {
      rank.sent = random_bytes(bytes, case_.dtype);
      if (has_nans) std::memset(rank.sent.data(), 0xff, kPackBytes / 2);
    }
    const DType weights = case_.weights_fp32 ? DType::kFloat32 : case_.dtype;
    const uint64_t weight_bytes = row_bytes * weight_factor();
    if (case_.form != CallForm::kPlain) call.residual = random_bytes(bytes, case_.dtype);
    call.weight = random_bytes(weight_bytes, weights);
    if (case_.form == CallForm::kSandwich) call.post_weight = random_bytes(weight_bytes, weights);
    expect(call);
    return call;
  }

  void expect(Call& call) const {
    const uint64_t row_bytes = row_bytes_of(call.shape);
    const auto or_null = [](const Bytes& bytes, uint64_t offset) {
      return bytes.empty() ? nullptr : bytes.data() + offset;
    };
    const Epilogue epilogue{case_.dtype,
                            hidden_of(call.shape),
                            case_.weights_fp32,
                            call.weight.data(),
                            or_null(call.post_weight, 0),
                            kEps,
                            kBias};
    const uint32_t answers = case_.algorithm ? 1 : case_.ranks;  // all ranks' alike, or not
    for (uint32_t answer = 0; answer < answers; ++answer) {
      call.norm_out.emplace_back(call.shape.rows * row_bytes);
      call.residual_out.emplace_back(call.shape.rows * row_bytes);
      for (uint64_t offset = 0; offset < call.shape.rows * row_bytes; offset += row_bytes) {
        std::vector<const void*> x;
        for (uint32_t r = 0; r < case_.ranks; ++r) {
          if (case_.algorithm || r == answer) x.push_back(ranks_[r].sent.data() + offset);
        }
        contract_row(epilogue, x, or_null(call.residual, offset), &call.norm_out[answer][offset],
                     &call.residual_out[answer][offset]);
      }
    }
  }

  // Of so many ranks. `in_place`: outputs are the inputs.
  void launch(const Call& call, const std::vector<uint32_t>& there, bool in_place) {
    const CallShape& shape = call.shape;
    const uint64_t bytes = shape.rows * row_bytes_of(shape);
    const bool has_residual = !call.residual.empty();
    RowParams row{};
    row.weight = weight_.put(call.weight);
    row.post_weight = call.post_weight.empty() ? nullptr : post_weight_.put(call.post_weight);
    row.rows = shape.rows;
    row.row_packs = shape.row_packs;
    row.packs_a_thread = shape.launch.packs_a_thread;
    row.hidden = static_cast<float>(hidden_of(shape));
    row.hidden_reciprocal = 1.0f / row.hidden;
    row.eps = kEps;
    row.weight_bias = kBias;
    row.weights_fp32 = case_.weights_fp32;
    OneLaunch launch{case_.dtype, case_.ranks, case_.algorithm, shape.launch, {}};
    for (const uint32_t r : there) {
      Rank& rank = ranks_[r];
      uint8_t* x = rank.x.put(rank.sent);
      uint8_t* residual = has_residual ? rank.residual.put(call.residual) : nullptr;
      rank.norm_out_at = in_place ? x : rank.norm_out.poison(bytes);
      rank.residual_out_at = in_place && has_residual ? residual : rank.residual_out.poison(bytes);
      row.x = x;
      row.residual = residual;
      row.norm_out = rank.norm_out_at;
      row.residual_out = rank.residual_out_at;
      launch.of.push_back({row, rank.exchange,
                           two_shot_params(case_.ranks, shape.rows, shape.row_packs,
                                           shape.launch.teams, shape.launch.lead_rows)});
    }
    device_.launch(launch);
  }

  // ---- a rank that does not come ----

  std::string run_without_one() {
    std::vector<uint32_t> others = all_ranks();
    others.erase(others.begin() + case_.missing);
    // The others wait, and give up. In the next call they do not wait.
    const Call first = new_call(calls_[0], false);
    for (uint32_t i = 0; i < 2; ++i) {
      launch(first, others, false);
      for (const uint32_t r : others) {
        std::string wrong = wrong_rows(first, r, kAllNan);
        if (wrong.empty()) wrong = wrong_report(r, i + 1);
        if (!wrong.empty()) {
          return "call " + std::to_string(i) + " without rank " + std::to_string(case_.missing) +
                 ", rank " + std::to_string(r) + ": " + wrong;
        }
      }
    }
    // Too late, for the first call. What the others sent is there; what they should have sent for
    // it, sums, is not: then it finds what they have reported.
    launch(first, {case_.missing}, false);
    const uint64_t record = ranks_[case_.missing].host_failure.value();
    std::string wrong = wrong_rows(first, case_.missing, record == 0 ? kRight : kRightOrNan);
    const bool is_known = std::any_of(others.begin(), others.end(), [&](uint32_t r) {
      return ranks_[r].host_failure.value() == record;
    });
    if (record != 0 && !is_known) wrong = "a report that is nobody's";
    if (case_.algorithm == Algorithm::kTwoShot && record == 0) wrong = "no failure is reported";
    if (!wrong.empty()) return "the late rank: " + wrong;
    return "";
  }

  std::string wrong_report(uint32_t r, uint32_t calls) const {
    const uint64_t bits = ranks_[r].host_failure.value();
    if (bits == 0) return "no failure is reported";
    const FailureRecord record = FailureRecord::of(bits);
    if (record.peer != case_.missing)
      return "the report names rank " + std::to_string(record.peer) + ", which was there";
    if (record.call != 0) return "the report names call " + std::to_string(record.call);
    if (record.row >= calls_[0].rows) return "the report names row " + std::to_string(record.row);
    if (header_of(r).failure_claim != 1) return "the claim word is wrong";
    for (const CallCopy& copy : header_of(r).call) {
      if (copy.failed != 1) return "the failed flag of a call copy is wrong";
      if (copy.number != calls) return "a copy of the call number is wrong";
    }
    for (uint32_t peer = 0; peer < case_.ranks; ++peer) {
      if (header_of(peer).board[r] != bits)
        return "the board of rank " + std::to_string(peer) + " is wrong";
    }
    return "";
  }

  // ---- checks ----

  enum Expected { kRight, kAllNan, kRightOrNan };  // the last for each row, in both outputs

  std::string wrong_rows(const Call& call, uint32_t r, Expected expected = kRight) const {
    const Rank& rank = ranks_[r];
    const uint64_t row_bytes = row_bytes_of(call.shape), bytes = call.shape.rows * row_bytes;
    const uint32_t answer = case_.algorithm ? 0 : r, hidden = hidden_of(call.shape);
    const Bytes got[] = {rank.norm_out.get(rank.norm_out_at, bytes),
                         rank.residual_out.get(rank.residual_out_at, bytes)};
    const Bytes* right[] = {&call.norm_out[answer], &call.residual_out[answer]};
    for (uint32_t row = 0; row < call.shape.rows; ++row) {
      bool is_right = true, is_nan = true;
      std::string first;
      for (uint32_t output = 0; output < 2; ++output) {
        for (uint32_t i = 0; i < hidden; ++i) {
          const uint32_t at = row * hidden + i;
          is_nan = is_nan && is_nan_element(case_.dtype, got[output].data(), at);
          if (same_element(case_.dtype, got[output].data(), right[output]->data(), at)) continue;
          is_right = false;
          if (first.empty()) {
            first = (output == 0 ? "norm_out" : "residual_out") + std::string(", row ") +
                    std::to_string(row) + ", element " + std::to_string(i);
          }
        }
      }
      if (expected != kAllNan && is_right) continue;
      if (expected != kRight && is_nan) continue;
      if (expected == kAllNan) return "row " + std::to_string(row) + " is not NaN";
      return first + " is not what the contract says";
    }
    return "";
  }

  InboxHeader header_of(uint32_t r) const {
    const Bytes bytes = ranks_[r].inbox.get(ranks_[r].inbox.begin(), sizeof(InboxHeader));
    InboxHeader header;
    std::memcpy(&header, bytes.data(), sizeof(header));
    return header;
  }

  // After so many calls without a failure.
  std::string wrong_inbox(uint32_t r, uint32_t calls) const {
    const Rank& rank = ranks_[r];
    if (rank.host_failure.value() != 0) return "a failure is reported";
    InboxHeader expected{};
    for (CallCopy& copy : expected.call) copy.number = calls;
    const InboxHeader header = header_of(r);
    if (std::memcmp(&header, &expected, sizeof(header)) != 0)
      return "the inbox's header is not as after " + std::to_string(calls) + " calls";
    const Bytes areas =
        rank.inbox.get(rank.inbox.begin() + kHeaderBytes, rank.inbox.bytes() - kHeaderBytes);
    const auto full =
        std::find_if(areas.begin(), areas.end(), [](uint8_t byte) { return byte != kEmptyByte; });
    if (full == areas.end()) return "";
    return "the inbox is not empty at byte " +
           std::to_string(kHeaderBytes + static_cast<uint64_t>(full - areas.begin()));
  }

  Device& device_;
  const Case& case_;
  const std::vector<CallShape> calls_;
  Random random_;
  Memory weight_, post_weight_;
  InboxLayout layout_{};
  std::vector<Rank> ranks_;
};

}  // namespace

std::string run_case(Device& device, const Case& c, uint64_t seed) {
  return Run(device, c, seed).run();
}

}  // namespace gan::testing
