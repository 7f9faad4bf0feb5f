// A case: a random sequence of calls on random memory, under a random schedule. All of it comes
// from a seed, so a failure repeats.
//
// Calls read what calls before them wrote, and write over what they read, as far as the product
// allows it: a stale read then shows in the result.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "device/params.h"
#include "engine.h"
#include "host/kernel_table.cuh"
#include "host/plan.h"
#include "random.h"

namespace gan::testing {

using emulator::Random;

// A rank's memory is some buffers; each rank has the same, with contents of its own.
struct Buffer {
  uint64_t bytes = 0;
  // Inputs have fresh random values in each repeat. Outputs are poisoned before each.
  bool is_input = false;
};
inline constexpr uint32_t kNoBuffer = UINT32_MAX;

struct Call {
  uint32_t kernel = 0;  // of kKernels
  uint64_t rows = 0;
  uint32_t row_packs = 1;  // the row's length
  PlanRule rule{};
  bool weights_fp32 = false;
  uint32_t stream = 0;
  // Numbers of buffers.
  uint32_t x = 0, weight = 0, norm_out = 0, residual_out = 0;
  uint32_t residual = kNoBuffer;     // none: the plain form
  uint32_t post_weight = kNoBuffer;  // none: not the sandwich form
};

// How often inputs hold what is no ordinary number: NaN, infinities, zeros, the mark of an empty
// inbox word.
enum class Specials { kNone, kFew, kMany };

struct Case {
  uint64_t seed = 0;
  uint32_t ranks = 2;
  DType dtype = DType::kBFloat16;
  std::vector<Buffer> buffers;
  std::vector<Call> calls;
  uint32_t repeats = 1;     // of all calls, with other inputs, as of a graph
  uint32_t first_call = 0;  // number of the first call
  uint64_t area_bytes =
      0;  // what an inbox takes of one peer; a call of more rows is several launches
  Specials specials = Specials::kNone;
  float eps = 0.0f, bias = 0.0f;
};

// What a stage leaves out, for the sake of its time.
struct Limits {
  uint32_t min_ranks = kMinRanks, max_ranks = kMaxRanks;  // now and then more than 4
  std::vector<DType> dtypes = {DType::kBFloat16, DType::kFloat16, DType::kFloat32};
  uint32_t min_calls = 1, max_calls = 6;
  uint32_t max_rows = 9;
  uint32_t max_row_packs = 512;
  uint32_t max_block_threads = 128;
  uint32_t max_call_threads = 1024;  // of a launch on all ranks
  bool large_grids = false;          // now and then hundreds of blocks, whatever the limits
  bool specials = true;
  bool reads_results = true;  // calls read what earlier ones wrote
  bool may_repeat = true;
  uint32_t last_exchanges = 0;  // so many of the last calls exchange rows
};

// A rule that takes every call: one_shot, by blocks of up to 512 threads.
PlanRule any_call_rule();

Case random_case(uint64_t seed, const Limits& limits);

// Schedule, tearing, block order and residency; `weak` and the rest are left alone.
emulator::Options random_options(uint64_t seed, const Case& c);

// The launches that a call is, and their shapes: the product's.
struct CallLaunch {
  uint64_t first_row, rows;
  LaunchShape shape;
};
std::vector<CallLaunch> launches_of(const Case& c, const Call& call);
// Of the largest launch.
uint32_t most_blocks_of(const Case& c);
// How far all repeats advance the call number.
uint32_t exchanges_of(const Case& c);

uint64_t inbox_bytes_of(const Case& c);
uint64_t row_bytes_of(const Call& call);
uint32_t hidden_of(const Case& c, const Call& call);

std::string describe(const Case& c);
std::string describe(const emulator::Options& options);

}  // namespace gan::testing
