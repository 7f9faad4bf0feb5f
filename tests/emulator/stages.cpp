#include "stages.h"

#include <algorithm>

#include "harness.h"
#include "kernels.h"
#include "statistics.h"

namespace gan::testing {
namespace {

enum class Memory { kPlain, kWeak, kStrict };

std::string run_random_case(uint64_t seed, const Limits& limits, Memory memory,
                            std::string& description) {
  const Case c = random_case(seed, limits);
  emulator::Options options = random_options(seed, c);
  options.weak = memory != Memory::kPlain;
  options.strict = memory == Memory::kStrict;
  description = describe(c) + "  " + describe(options);
  count_case(c);
  return run_case(c, options);
}
std::string run_plain(uint64_t seed, const Limits& limits, std::string& description) {
  return run_random_case(seed, limits, Memory::kPlain, description);
}
std::string run_weak(uint64_t seed, const Limits& limits, std::string& description) {
  return run_random_case(seed, limits, Memory::kWeak, description);
}
std::string run_strict(uint64_t seed, const Limits& limits, std::string& description) {
  return run_random_case(seed, limits, Memory::kStrict, description);
}

// ---- full size ----

struct FullSize {
  uint32_t kernel, ranks, hidden, rows, blocks_a_team;
  DType dtype;
};

// Each kernel as models call it, and with so many segments that a lane adds several.
std::vector<FullSize> full_sizes() {
  std::vector<FullSize> sizes;
  for (uint32_t kernel = 0; kernel < kKernelCount; ++kernel) {
    sizes.push_back({kernel, 4, 4096, 3, 1, DType::kBFloat16});
    sizes.push_back({kernel, 2, 16384, 1, 2, DType::kFloat32});
  }
  return sizes;
}

Case full_case(uint64_t seed, const FullSize& size) {
  Case c;
  c.seed = seed;
  c.ranks = size.ranks;
  c.dtype = size.dtype;
  c.eps = 1e-6f;
  c.bias = 1.0f;
  Call call;
  call.kernel = size.kernel;
  call.rows = size.rows;
  call.row_packs = size.hidden / (size.dtype == DType::kFloat32 ? 4 : 8);
  call.rule = any_call_rule();
  call.rule.algorithm = kKernels[size.kernel].algorithm.value_or(Algorithm::kOneShot);
  call.rule.blocks_a_team = size.blocks_a_team;
  call.rule.trigger = Trigger::kAtStart;
  call.rule.multiprocessors = 2;
  const uint64_t bytes = size.rows * row_bytes_of(call);
  c.buffers = {{bytes, true},
               {bytes, true},
               {row_bytes_of(call), true},
               {row_bytes_of(call), true},
               {bytes, false}};
  // The sandwich form, residual in place, as decoders have it; twice, for both stages.
  call.x = 0, call.residual = 1, call.weight = 2, call.post_weight = 3;
  call.norm_out = 4, call.residual_out = 1;
  c.calls.push_back(call);
  call.x = 4, call.norm_out = 0;
  c.calls.push_back(call);
  c.area_bytes = bytes_of_area(c.ranks, size.rows, size.rows, row_bytes_of(call));
  return c;
}

std::string run_full(uint64_t seed, const Limits& limits, std::string& description) {
  const std::vector<FullSize> sizes = full_sizes();
  FullSize size = sizes[seed % sizes.size()];
  size.ranks = std::min(size.ranks, limits.max_ranks);
  if (limits.dtypes.size() == 1) size.dtype = limits.dtypes[0];
  const Case c = full_case(seed, size);
  emulator::Options options = random_options(seed, c);
  description = describe(c) + "  " + describe(options);
  count_case(c);
  return run_case(c, options);
}

Limits fuzz_limits() {
  Limits limits;
  limits.large_grids = true;
  return limits;
}
Limits weak_limits() {
  Limits limits;
  limits.max_call_threads = 512;
  return limits;
}
Limits strict_limits() {
  Limits limits = weak_limits();
  limits.max_ranks = 3;  // its build has no more
  return limits;
}
// ThreadSanitizer needs megabytes for each fiber, and much time.
Limits sanitizer_limits() {
  Limits limits;
  limits.max_ranks = 3;
  limits.max_calls = 3;
  limits.max_rows = 3;
  limits.max_row_packs = 256;
  limits.max_block_threads = 64;
  limits.max_call_threads = 384;
  return limits;
}

}  // namespace

const std::vector<Stage>& stages() {
  static const std::vector<Stage> all = {
      {"fuzz", "random calls and schedules", "plain", 2000, fuzz_limits(), run_plain},
      {"weak", "with loads that give old values, and races found", "plain", 500, weak_limits(),
       run_weak},
      {"strict", "weak, where pushes must come after clears; for GAN_STRICT_ORDER", "strict", 100,
       strict_limits(), run_strict},
      {"tsan", "fuzz, built with ThreadSanitizer", "tsan", 300, sanitizer_limits(), run_plain},
      {"asan", "fuzz, built with AddressSanitizer and UBSan", "asan", 200, sanitizer_limits(),
       run_plain},
      {"full",
       "each kernel at full size",
       "plain",
       static_cast<uint32_t>(full_sizes().size()),
       {},
       run_full},
      {"faults", "ranks that never come, are late or stop", "plain", 400, weak_limits(),
       run_fault_case},
      {"debug", "debug mode, with ranks that call otherwise or not at all", "plain", 200,
       weak_limits(), run_debug_case},
      {"mixed", "two ranks, by one algorithm each", "plain", 100, weak_limits(), run_mixed_case},
      {"explore",
       "every order of accesses, in small cases",
       "plain",
       exploration_count(),
       {},
       run_exploration},
  };
  return all;
}

}  // namespace gan::testing
