#include "matrix.h"

namespace gan::testing {
namespace {

constexpr uint32_t kBlocksATeam[] = {1, 2, 4};
constexpr uint32_t kTeamSizes = 3;
constexpr DType kDTypes[] = {DType::kBFloat16, DType::kFloat16, DType::kFloat32};
constexpr Algorithm kAlgorithms[] = {Algorithm::kOneShot, Algorithm::kTwoShot};

struct FormAndWeights {
  CallForm form;
  bool weights_fp32;
};

std::vector<FormAndWeights> forms_of(DType dtype) {
  std::vector<FormAndWeights> forms = {
      {CallForm::kResidual, false}, {CallForm::kSandwich, false}, {CallForm::kPlain, false}};
  if (dtype != DType::kFloat32) {
    forms.push_back({CallForm::kPlain, true});
    forms.push_back({CallForm::kSandwich, true});
  }
  return forms;
}

// The calls that one kernel may be for, or some that are surely all of them (kernel_table.cuh).
void add_forms(std::vector<Case>& cases, Case c, Extent extent) {
  const std::vector<FormAndWeights> forms = forms_of(c.dtype);
  const auto count = static_cast<uint32_t>(forms.size());
  const bool has_forms = c.dtype == DType::kBFloat16 && c.one_pack;
  const uint32_t turn = c.ranks + (c.one_pack ? 1 : 0);
  for (uint32_t i = 0; i < count; ++i) {
    if (extent == Extent::kQuick && (has_forms ? i > 2 : i != turn % count)) continue;
    c.form = forms[i].form;
    c.weights_fp32 = forms[i].weights_fp32;
    for (uint32_t size = 0; size < kTeamSizes; ++size) {
      if (extent != Extent::kFull && size != (turn + i) % kTeamSizes) continue;
      c.blocks_a_team = kBlocksATeam[size];
      cases.push_back(c);
    }
  }
}

void add_failures(std::vector<Case>& cases, Extent extent) {
  uint32_t turn = 0;
  for (const DType dtype : kDTypes) {
    for (const uint32_t ranks : {2u, 3u, 8u}) {
      if (extent == Extent::kQuick && ranks != 3) continue;
      for (const Algorithm algorithm : kAlgorithms) {
        for (const bool one_pack : {false, true}) {
          const uint32_t size = kBlocksATeam[turn % kTeamSizes], missing = turn % ranks;
          const CallForm form = turn % 4 == 3 ? CallForm::kSandwich : CallForm::kResidual;
          cases.push_back({dtype, ranks, algorithm, one_pack, form, false, size, missing});
          ++turn;
        }
      }
    }
  }
}

}  // namespace

std::vector<Case> matrix(Extent extent) {
  std::vector<Case> cases;
  for (const DType dtype : kDTypes) {
    for (const bool one_pack : {false, true}) {
      for (uint32_t ranks = 2; ranks <= kMaxRanks; ++ranks) {
        for (const Algorithm algorithm : kAlgorithms)
          add_forms(cases, {dtype, ranks, algorithm, one_pack, {}, false, 1}, extent);
      }
      add_forms(cases, {dtype, 2, std::nullopt, one_pack, {}, false, 1}, extent);
    }
  }
  add_failures(cases, extent);
  return cases;
}

std::vector<CallShape> calls_of(const Case& c) {
  std::vector<CallShape> calls;
  const auto add = [&](uint32_t rows, uint32_t row_packs, uint32_t max_threads, Trigger trigger,
                       uint32_t lead_rows) {
    PlanRule rule{};
    rule.algorithm = c.algorithm.value_or(Algorithm::kOneShot);
    rule.blocks_a_team = c.blocks_a_team;
    rule.max_threads = max_threads;
    rule.threads_a_multiprocessor = kMaxThreadsAMultiprocessor / 2;
    rule.trigger = trigger;
    rule.lead_rows = lead_rows;
    // Four blocks a rank: all blocks of eight ranks run at once, also where a tool makes them
    // large.
    rule.multiprocessors = 1;
    calls.push_back({rows, row_packs, shape_of(rule, rows, row_packs)});
  };
  // Two warps a block, and a row that does not fill them; teams with one row more than the others.
  const uint32_t blocks = c.blocks_a_team;
  const uint32_t row_packs = c.one_pack ? 64 * blocks - 13 : 192 * blocks - 29;
  add(5, row_packs, 64, Trigger::kAfterPush, 2);
  // A short row, of which some blocks have no pack where that is possible.
  add(1, c.one_pack ? 3 : 64 * blocks - 5, 32, Trigger::kNever, 1);
  add(3, row_packs, 64, Trigger::kAtStart, 1);
  return calls;
}

std::string describe(const Case& c) {
  static constexpr const char* kDTypeNames[] = {"bf16", "fp16", "fp32"};
  static constexpr const char* kFormNames[] = {"plain", "residual", "sandwich"};
  std::string text = kDTypeNames[static_cast<uint32_t>(c.dtype)];
  text += ", " + std::to_string(c.ranks) + " ranks, ";
  text += c.algorithm ? kAlgorithmNames[static_cast<uint32_t>(*c.algorithm)] : "local_norm";
  text += c.one_pack ? ", one pack a thread, " : ", several packs a thread, ";
  text += kFormNames[static_cast<uint32_t>(c.form)];
  if (c.weights_fp32) text += ", fp32 weights";
  text += ", " + std::to_string(c.blocks_a_team) + " blocks a team";
  if (c.missing != kNobody) text += ", rank " + std::to_string(c.missing) + " missing";
  return text;
}

}  // namespace gan::testing
