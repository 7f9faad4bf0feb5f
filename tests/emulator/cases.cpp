#include "cases.h"

#include <algorithm>
#include <optional>
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

// A row and the team that shares it.
struct TeamShape {
  uint32_t row_packs, blocks, max_threads;
};

// Half of them so that every block of the team, to its last warp, has packs; the others short rows,
// for many calls in little time, and blocks without packs.
TeamShape random_team(Random& random, const Limits& limits) {
  TeamShape team;
  team.blocks = one_of(random, {1u, 1u, 1u, 2u, 2u, 2u, 3u, 3u, 4u, 4u, 8u});
  team.max_threads = std::min(one_of(random, {32u, 64u, 64u, 128u}), limits.max_block_threads);
  uint32_t packs = one_of(random, {1u, 1u, 1u, 2u, 3u});
  if (random.one_in(2)) {
    team.row_packs = 1 + random.below(one_of(random, {1u, 3u, 8u, 33u}));
    return team;
  }
  while (packs * team.blocks * team.max_threads > limits.max_row_packs) {
    uint32_t& less = packs > 1 ? packs : team.blocks > 2 ? team.blocks : team.max_threads;
    less = (less + 1) / 2;
  }
  team.row_packs = packs * team.blocks * team.max_threads - random.below(team.max_threads);
  return team;
}

PlanRule rule_of(const TeamShape& team, Trigger trigger, uint32_t multiprocessors) {
  PlanRule rule = any_call_rule();
  rule.blocks_a_team = team.blocks;
  rule.max_threads = team.max_threads;
  rule.trigger = trigger;
  rule.multiprocessors = multiprocessors;
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
    const TeamShape teams[] = {random_team(random_, limits_), random_team(random_, limits_)};
    const bool early = random_.below(3) != 0;
    const bool one_stream = random_.below(4) != 0;
    const bool large = limits_.large_grids && case_.ranks == kMinRanks && random_.one_in(16);
    const uint32_t more = case_.ranks > kUsualRanks || large ? 2 : limits_.max_calls;
    const uint32_t calls = limits_.min_calls +
                           random_.below(std::max(more, limits_.min_calls) - limits_.min_calls + 1);
    max_rows_ = large ? 100 + random_.below(301) : limits_.max_rows;
    const uint32_t most_packs = large ? 1 : std::max(teams[0].row_packs, teams[1].row_packs);
    max_bytes_ = uint64_t{max_rows_} * most_packs * kPackBytes;
    for (uint32_t i = 0; i < calls; ++i) {
      Call call;
      take_kernel(call, random_kernel());
      call.stream = one_stream ? 0 : random_.below(2);
      const Trigger trigger = early && random_.below(8) != 0
                                  ? one_of(random_, {Trigger::kAtStart, Trigger::kAfterPush})
                                  : Trigger::kNever;
      if (large) {
        choose_large_shape(call, trigger);
      } else {
        choose_shape(call, teams[random_.below(2)], trigger);
      }
      choose_inputs(call);
      choose_outputs(call);
      case_.calls.push_back(call);
    }
    exchange_at_least_once();
    exchange_last();
    choose_area();
    return case_;
  }

 private:
  void choose_group() {
    const auto between = [&](uint32_t least, uint32_t most) {
      return least + random_.below(most - least + 1);
    };
    case_.ranks = between(limits_.min_ranks,
                          std::max(limits_.min_ranks, std::min(limits_.max_ranks, kUsualRanks)));
    if (limits_.max_ranks > kUsualRanks && random_.one_in(12))
      case_.ranks = between(std::max(limits_.min_ranks, kUsualRanks + 1), limits_.max_ranks);
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
    return random_.one_in(4) ? random_.below(kKernelCount) : random_exchange(random_);
  }
  static void take_kernel(Call& call, uint32_t kernel) {
    call.kernel = kernel;
    call.rule.algorithm = kKernels[kernel].algorithm.value_or(Algorithm::kOneShot);
  }

  void take_rule(Call& call, PlanRule rule) {
    rule.algorithm = call.rule.algorithm;
    rule.lead_rows = 1 + random_.below(3);
    call.rule = rule;
  }

  void choose_shape(Call& call, TeamShape team, Trigger trigger) {
    call.rows = random_.below(limits_.max_rows + 1);
    call.row_packs = team.row_packs;
    // Another team for the same row: calls next to each other have other shapes.
    if (random_.one_in(4)) team.blocks = one_of(random_, {1u, 2u, 4u});
    // Few teams, so that each has several rows.
    take_rule(call, rule_of(team, trigger, 1 + random_.below(2)));
    call.rule.threads_a_multiprocessor = one_of(random_, {32u, 128u, 512u});
    const auto is_too_large = [&] {
      const LaunchShape shape =
          shape_of(call.rule, std::max<uint64_t>(call.rows, 1), call.row_packs);
      return case_.ranks * shape.blocks() * shape.threads > limits_.max_call_threads;
    };
    while (is_too_large()) {
      if (call.rule.multiprocessors > 1) {
        call.rule.multiprocessors = 1;
      } else if (call.rows > 1) {
        call.rows /= 2;  // fewer teams, rather than blocks of fewer warps
      } else if (call.rule.max_threads > 32) {
        call.rule.max_threads /= 2;
      } else {
        call.rule.blocks_a_team = 1;
      }
    }
  }
  // Up to as many blocks as a launch can have.
  void choose_large_shape(Call& call, Trigger trigger) {
    call.rows = max_rows_ - random_.below(max_rows_ / 4);
    call.row_packs = 1;
    const TeamShape team = {1, one_of(random_, {1u, 1u, 2u}), 32};
    take_rule(call, rule_of(team, trigger, 20 + random_.below(113)));
  }
  void exchange_at_least_once() {
    for (const Call& call : case_.calls) {
      if (kKernels[call.kernel].exchanges() && call.rows > 0) return;
    }
    exchange(case_.calls[random_.below(static_cast<uint32_t>(case_.calls.size()))]);
  }
  void exchange_last() {
    for (size_t i = case_.calls.size() - limits_.last_exchanges; i < case_.calls.size(); ++i)
      exchange(case_.calls[i]);
  }
  void exchange(Call& call) {
    take_kernel(call, random_exchange(random_));
    call.rows = std::max<uint64_t>(call.rows, 1);
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
    std::vector<uint64_t> of_calls = {1};  // bytes that a row takes
    for (const Call& call : case_.calls)
      of_calls.push_back(kKernels[call.kernel].row_bytes_of_area(case_.ranks, row_bytes_of(call)));
    const uint64_t row = *std::max_element(of_calls.begin(), of_calls.end());
    uint64_t bytes = max_rows_ * row;
    if (random_.one_in(4)) {
      // Of any call, as other kernels take other bytes; but in large grids two launches a call,
      // for more would take too long.
      const bool large = max_rows_ > limits_.max_rows;
      const uint64_t some_row =
          large ? row : of_calls[random_.below(static_cast<uint32_t>(of_calls.size()))];
      const uint32_t least = large ? max_rows_ / 2 : 1;
      bytes = std::max(row, some_row * (least + random_.below(max_rows_ - least + 1)));
    }
    case_.area_bytes = round_up(bytes + kTwoShotGapBytes, kAreaAlignment);
  }

  const Limits& limits_;
  Random random_;
  Case case_;
  uint32_t max_rows_ = 0;
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

PlanRule any_call_rule() {
  PlanRule rule{};
  rule.max_rows = rule.max_row_packs = UINT32_MAX;
  rule.max_packs = UINT64_MAX;
  rule.blocks_a_team = 1;
  rule.max_threads = rule.threads_a_multiprocessor = 512;
  rule.lead_rows = 1;
  rule.multiprocessors = 1;
  return rule;
}

Case random_case(uint64_t seed, const Limits& limits) { return CaseMaker(seed, limits).make(); }

emulator::Options random_options(uint64_t seed, const Case& c) {
  Random random(seed ^ 0x5ced);
  emulator::Options options;
  options.seed = seed;
  options.schedule = one_of(random, {emulator::Schedule::kUniform, emulator::Schedule::kOneSlowRank,
                                     emulator::Schedule::kBursts, emulator::Schedule::kRoundRobin});
  options.tear = random.one_in(2);
  options.any_block_order = random.one_in(2);
  // The kernel that runs has all its blocks; the next may have to wait with some of its own.
  if (random.one_in(2)) {
    const uint32_t blocks = most_blocks_of(c);
    options.resident_blocks = blocks + random.below(blocks);
  }
  return options;
}

uint64_t inbox_bytes_of(const Case& c) {
  return kHeaderBytes + kStages * (c.ranks - 1) * c.area_bytes;
}
uint64_t row_bytes_of(const Call& call) { return uint64_t{call.row_packs} * kPackBytes; }

uint32_t hidden_of(const Case& c, const Call& call) {
  return call.row_packs * (kPackBytes / bytes_of_element(c.dtype));
}

// As Workspace::run, with an algorithm asked for, and run_local: a call without rows launches
// nothing.
std::vector<CallLaunch> launches_of(const Case& c, const Call& call) {
  std::vector<CallLaunch> launches;
  const InboxLayout layout = InboxLayout::of(c.ranks, inbox_bytes_of(c));
  const std::optional<Algorithm> wanted = kKernels[call.kernel].algorithm;
  const std::vector<PlanRule> rules = {call.rule};
  for (uint64_t first = 0, rows = 0; first < call.rows; first += rows) {
    PlannedLaunch next = {call.rows, &call.rule};
    if (wanted) next = next_launch(rules, layout, call.rows - first, call.row_packs, wanted);
    rows = next.rows;
    if (rows == 0) throw std::logic_error("area: one that holds a row is required");
    launches.push_back({first, rows, next.shape(call.row_packs)});
  }
  return launches;
}

uint32_t most_blocks_of(const Case& c) {
  uint32_t most = 1;
  for (const Call& call : c.calls) {
    for (const CallLaunch& launch : launches_of(c, call))
      most = std::max(most, launch.shape.blocks());
  }
  return most;
}

uint32_t exchanges_of(const Case& c) {
  size_t launches = 0;
  for (const Call& call : c.calls) {
    if (kKernels[call.kernel].exchanges()) launches += launches_of(c, call).size();
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
      if (launch.shape.algorithm == Algorithm::kTwoShot)
        text << ", lead of " << launch.shape.lead_rows << " rows";
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
  if (options.eager_rank != UINT32_MAX) text << ", rank " << options.eager_rank << " eager";
  for (const emulator::Stall& stall : options.stalls) {
    text << ", rank " << stall.rank << " stands still after " << stall.after_accesses
         << " accesses";
    if (stall.until_ns != emulator::Stall::kForEver) text << " until " << stall.until_ns << " ns";
  }
  return text.str();
}

}  // namespace gan::testing
