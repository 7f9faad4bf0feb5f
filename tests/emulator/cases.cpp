#include "cases.h"

#include <algorithm>
#include <sstream>

#include "contract.h"
#include "device/inbox.h"
#include "kernels.h"

namespace gan::testing {
namespace {

template <typename T>
T one_of(Random& random, std::initializer_list<T> choices) {
  return choices.begin()[random.below(static_cast<uint32_t>(choices.size()))];
}

// Many short rows, some that a thread has several packs of.
uint32_t random_row_packs(Random& random, const Limits& limits) {
  const uint32_t most = one_of(random, {1u, 3u, 8u, 8u, 33u, 33u, 70u, 300u});
  return 1 + random.below(std::min(most, limits.max_row_packs));
}

PlanRule random_rule(Random& random, const Limits& limits, uint32_t ranks, bool early) {
  PlanRule rule{};
  rule.max_rows = rule.max_row_packs = UINT32_MAX;
  rule.blocks_a_team = one_of(random, {1u, 1u, 2u, 4u});
  rule.max_threads = std::min(one_of(random, {32u, 32u, 64u, 128u}), limits.max_block_threads);
  rule.trigger = early ? one_of(random, {Trigger::kAtStart, Trigger::kAfterPush}) : Trigger::kNever;
  rule.multiprocessors = 1 + random.below(2);  // few, so that there are more rows than teams
  const uint32_t most_blocks = rule.multiprocessors * kBlocksAMultiprocessor;
  while (rule.max_threads > 32 && ranks * most_blocks * rule.max_threads > limits.max_call_threads)
    rule.max_threads /= 2;
  return rule;
}

constexpr uint32_t kUsualRanks = 4;

class CaseMaker {
 public:
  CaseMaker(uint64_t seed, const Limits& limits) : limits_(limits), random_(seed) {
    case_.seed = seed;
  }

  Case make() {
    choose_group();
    const uint32_t row_packs[] = {random_row_packs(random_, limits_),
                                  random_row_packs(random_, limits_)};
    const bool early = random_.below(3) != 0;
    const bool one_stream = random_.below(4) != 0;
    const uint32_t calls = 1 + random_.below(limits_.max_calls);
    max_bytes_ = uint64_t{limits_.max_rows} * std::max(row_packs[0], row_packs[1]) * kPackBytes;
    for (uint32_t i = 0; i < calls; ++i) {
      Call call;
      call.kernel = random_kernel();
      call.rows = random_.below(limits_.max_rows + 1);
      call.row_packs = row_packs[random_.below(2)];
      call.rule = random_rule(random_, limits_, case_.ranks, early && random_.below(8) != 0);
      call.stream = one_stream ? 0 : random_.below(2);
      choose_inputs(call);
      choose_outputs(call);
      case_.calls.push_back(call);
    }
    choose_area();
    return case_;
  }

 private:
  void choose_group() {
    case_.ranks = 2 + random_.below(std::min(limits_.max_ranks, kUsualRanks) - 1);
    if (limits_.max_ranks > kUsualRanks && random_.one_in(24))
      case_.ranks = kUsualRanks + 1 + random_.below(limits_.max_ranks - kUsualRanks);
    case_.dtype = limits_.dtypes[random_.below(static_cast<uint32_t>(limits_.dtypes.size()))];
    case_.repeats = !limits_.may_repeat || random_.below(3) != 0 ? 1 : 2 + random_.below(2);
    // 0, 1, or so that the number wraps on the way.
    case_.first_call = random_.below(2) != 0 ? random_.below(2) : 0u - 1 - random_.below(6);
    if (limits_.specials)
      case_.specials = one_of(random_, {Specials::kNone, Specials::kFew, Specials::kMany});
    case_.eps = one_of(random_, {1e-6f, 1e-5f, 0.0f});
    case_.bias = one_of(random_, {1.0f, 1.0f, 0.0f});
  }

  // Mostly those that exchange.
  uint32_t random_kernel() {
    const uint32_t kernel = random_.below(kKernelCount);
    return kKernels[kernel].exchanges || random_.one_in(2) ? kernel : random_.below(kKernelCount);
  }

  uint32_t new_buffer(uint64_t bytes, bool is_input) {
    case_.buffers.push_back({bytes, is_input});
    return static_cast<uint32_t>(case_.buffers.size() - 1);
  }
  // Fresh, or what a call has written.
  uint32_t random_rows() {
    if (limits_.reads_results && !written_.empty() && random_.one_in(2))
      return written_[random_.below(static_cast<uint32_t>(written_.size()))];
    return new_buffer(max_bytes_, true);
  }
  // The first row of what a call has written is a weight too.
  uint32_t random_weight(const Call& call) {
    if (!call.weights_fp32 && random_.one_in(3)) return random_rows();
    const uint64_t factor = call.weights_fp32 ? 4 / bytes_of_element(case_.dtype) : 1;
    return new_buffer(row_bytes_of(call) * factor, true);
  }
  void choose_inputs(Call& call) {
    call.weights_fp32 = case_.dtype != DType::kFloat32 && random_.one_in(3);
    call.x = random_rows();
    if (random_.below(4) != 0) call.residual = random_rows();
    call.weight = random_weight(call);
    if (call.residual != kNoBuffer && random_.one_in(2)) call.post_weight = random_weight(call);
  }

  // The input itself, unless somebody else needs it as it is.
  bool may_take(const Call& call, uint32_t buffer) const {
    return buffer != kNoBuffer && buffer != call.weight && buffer != call.post_weight;
  }
  void choose_outputs(Call& call) {
    const uint32_t inputs[] = {call.x, call.residual};
    for (uint32_t* output : {&call.residual_out, &call.norm_out}) {
      const uint32_t alias = inputs[random_.below(2)];
      const bool in_place = random_.one_in(2) && may_take(call, alias);
      *output = in_place ? alias : new_buffer(max_bytes_, false);
    }
    if (call.norm_out == call.residual_out) call.norm_out = new_buffer(max_bytes_, false);
    written_.push_back(call.norm_out);
    written_.push_back(call.residual_out);
  }

  // Now and then smaller than a call, never smaller than a row.
  void choose_area() {
    uint64_t row = 1;
    for (const Call& call : case_.calls) row = std::max(row, row_bytes_of(call));
    const uint64_t rows =
        random_.one_in(4) ? 1 + random_.below(limits_.max_rows) : limits_.max_rows;
    case_.area_bytes = round_up(rows * row, kAreaAlignment);
  }

  const Limits& limits_;
  Random random_;
  Case case_;
  uint64_t max_bytes_ = 0;
  std::vector<uint32_t> written_;  // by the calls so far
};

const char* name_of(DType dtype) {
  return dtype == DType::kBFloat16 ? "bf16" : dtype == DType::kFloat16 ? "fp16" : "fp32";
}
const char* name_of(Trigger trigger) {
  return trigger == Trigger::kNever     ? "alone"
         : trigger == Trigger::kAtStart ? "early at start"
                                        : "early after push";
}

}  // namespace

Case random_case(uint64_t seed, const Limits& limits) { return CaseMaker(seed, limits).make(); }

emulator::Options random_options(uint64_t seed, const Case& c) {
  Random random(seed ^ 0x5ced);
  emulator::Options options;
  options.seed = seed;
  options.schedule = one_of(random, {emulator::Schedule::kUniform, emulator::Schedule::kOneSlowRank,
                                     emulator::Schedule::kBursts, emulator::Schedule::kRoundRobin});
  options.tear = random.one_in(2);
  options.any_block_order = random.one_in(2);
  if (random.one_in(2)) {
    uint32_t blocks = 1;
    for (const Call& call : c.calls) {
      for (const CallLaunch& launch : launches_of(c, call))
        blocks = std::max(blocks, launch.shape.blocks());
    }
    options.resident_blocks = 2 * blocks + random.below(3);
  }
  return options;
}

uint64_t row_bytes_of(const Call& call) { return uint64_t{call.row_packs} * kPackBytes; }

uint32_t hidden_of(const Case& c, const Call& call) {
  return call.row_packs * (kPackBytes / bytes_of_element(c.dtype));
}

// As Workspace::run: a call without rows launches nothing.
std::vector<CallLaunch> launches_of(const Case& c, const Call& call) {
  std::vector<CallLaunch> launches;
  const uint64_t most =
      kKernels[call.kernel].exchanges ? c.area_bytes / row_bytes_of(call) : UINT32_MAX;
  for (uint64_t first = 0; first < call.rows; first += most) {
    const uint64_t rows = std::min(most, call.rows - first);
    launches.push_back({first, rows, shape_of(call.rule, rows, call.row_packs)});
  }
  return launches;
}

uint32_t exchanges_of(const Case& c) {
  size_t launches = 0;
  for (const Call& call : c.calls) {
    if (kKernels[call.kernel].exchanges) launches += launches_of(c, call).size();
  }
  return static_cast<uint32_t>(launches * c.repeats);
}

std::string describe(const Case& c) {
  std::ostringstream text;
  text << c.ranks << " ranks, " << name_of(c.dtype) << ", first call " << c.first_call << ", "
       << c.repeats << " repeats, areas of " << c.area_bytes << " bytes, eps " << c.eps << ", bias "
       << c.bias << ", specials " << static_cast<int>(c.specials) << "\n";
  const auto buffer = [&](const char* name, uint32_t number) {
    if (number == kNoBuffer) return;
    text << " " << name << " " << number << (c.buffers[number].is_input ? "*" : "");
  };
  for (const Call& call : c.calls) {
    text << "  " << kKernels[call.kernel].name << " " << call.rows << " rows of " << call.row_packs
         << " packs, " << name_of(call.rule.trigger) << ", stream " << call.stream
         << (call.weights_fp32 ? ", fp32 weights" : "") << ", buffers (* input):";
    buffer("x", call.x);
    buffer("residual", call.residual);
    buffer("weight", call.weight);
    buffer("post_weight", call.post_weight);
    buffer("norm_out", call.norm_out);
    buffer("residual_out", call.residual_out);
    for (const CallLaunch& launch : launches_of(c, call)) {
      text << "; " << launch.rows << " rows: " << launch.shape.teams << " teams of "
           << launch.shape.blocks_a_team << " blocks of " << launch.shape.threads << " threads, "
           << launch.shape.packs_a_thread << " packs each";
    }
    text << "\n";
  }
  return text.str();
}

std::string describe(const emulator::Options& options) {
  static constexpr const char* kSchedules[] = {"uniform", "one slow rank", "bursts", "round robin"};
  std::ostringstream text;
  text << "schedule " << kSchedules[static_cast<int>(options.schedule)];
  if (options.tear) text << ", torn accesses";
  if (options.weak) text << (options.strict ? ", strict weak memory" : ", weak memory");
  if (options.any_block_order) text << ", blocks in any order";
  if (options.resident_blocks != 0) text << ", " << options.resident_blocks << " resident blocks";
  if (options.one_look_late != 0) text << ", one look of " << options.one_look_late << " late";
  for (const emulator::Stall& stall : options.stalls) {
    text << ", rank " << stall.rank << " stands still after " << stall.after_accesses
         << " accesses";
    if (stall.until_ns != emulator::Stall::kForEver) text << " until " << stall.until_ns << " ns";
  }
  return text.str();
}

}  // namespace gan::testing
