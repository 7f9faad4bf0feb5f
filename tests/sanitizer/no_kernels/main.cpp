// Without a GPU: whether the matrix leaves out no kernel of the table, and whether its launches are
// possible. The kernels themselves are replaced by empty ones, which compile at once.
//
// Prints `extent cases kernels-run kernels blocks` for each extent, blocks of the largest launch.
#include <algorithm>
#include <cstdio>

#include "host/kernel_table.cuh"
#include "table.h"

template struct gan::KernelTable<gan::DType::kBFloat16>;
template struct gan::KernelTable<gan::DType::kFloat16>;
template struct gan::KernelTable<gan::DType::kFloat32>;

using namespace gan;
using namespace gan::testing;

int main() {
  static constexpr const char* kNames[] = {"quick", "usual", "full"};
  const std::set<const void*> kernels = all_kernels();
  for (const Extent extent : {Extent::kQuick, Extent::kUsual, Extent::kFull}) {
    std::set<const void*> run;
    uint32_t most_blocks = 0;
    const std::vector<Case> cases = matrix(extent);
    for (const Case& c : cases) {
      const char something = 0;
      RowParams row{};
      if (c.form != CallForm::kPlain) row.residual = &something;
      if (c.form == CallForm::kSandwich) row.post_weight = &something;
      row.weights_fp32 = c.weights_fp32;
      for (const CallShape& call : calls_of(c)) {
        row.rows = call.rows;
        row.row_packs = call.row_packs;
        const bool one_pack = call.launch.packs_a_thread == 1;
        if (one_pack != c.one_pack || !is_possible(call.launch, row)) {
          std::printf("%s: a launch that is not what it says\n", describe(c).c_str());
          return 1;
        }
        if (c.missing == kNobody)
          run.insert(address_of(c.dtype, c.ranks, c.algorithm, one_pack, form_of(row)));
        most_blocks = std::max(most_blocks, c.ranks * call.launch.blocks());
      }
    }
    const auto known = std::count_if(
        run.begin(), run.end(), [&](const void* kernel) { return kernels.count(kernel) != 0; });
    std::printf("%s %zu %td %zu %u\n", kNames[static_cast<uint32_t>(extent)], cases.size(), known,
                kernels.size(), most_blocks);
  }
  return 0;
}
