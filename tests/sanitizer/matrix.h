// What is run under the sanitizers: every kernel of the table at least once, in small cases, since
// the tools take up to a hundred times as long. Without CUDA: tests/cpu/test_sanitizers.py asks
// whether no kernel is left out.
#pragma once
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "device/params.h"
#include "host/plan.h"

namespace gan::testing {

enum class CallForm : uint32_t { kPlain, kResidual, kSandwich };

inline constexpr uint32_t kNobody = UINT32_MAX;

// Some calls of one kernel by all ranks.
struct Case {
  DType dtype;
  uint32_t ranks;
  std::optional<Algorithm> algorithm;  // none: local_norm, by each rank for itself
  bool one_pack;
  CallForm form;
  bool weights_fp32;
  uint32_t blocks_a_team;
  uint32_t missing = kNobody;  // a rank that does not come: the others give up
};

struct CallShape {
  uint32_t rows, row_packs;
  LaunchShape launch;
};

// quick: one case for each kernel, more or less. full: every size of clusters for every case.
enum class Extent { kQuick, kUsual, kFull };
std::vector<Case> matrix(Extent extent);

// In the order in which they are made.
std::vector<CallShape> calls_of(const Case& c);

std::string describe(const Case& c);

}  // namespace gan::testing
