// The yardstick: N ranks as N streams of one process, on one GPU, each with an equal share of its
// SMs, or on several (--gpus). Graphs of dependent calls of the product's own kernels, microseconds
// a call, beside the floor: the residual add and norm alone, in the same share of the SMs. No
// torch, no Python.
//
//   streams [--ranks 2,4,8] [--gpus 1] [--hidden 4096] [--rows 1,8,64]
//           [--form plain|residual|sandwich] [--algorithms one_shot,two_shot] [--teams 1,2,4,8]
//           [--leads 1] [--resident 2,1] [--threads 512] [--trigger 2] [--rounds 1]
//           [--rules FILE] [--json FILE] [--device -]
//
// --device prints the number of multiprocessors and the compute capability, and ends. --gpus: rank
// r is on GPU r % gpus; with a GPU a rank each has all its SMs. A line for each algorithm, number
// of blocks a team, and lead of the pushes (two-shot), and one for the plan with --rules
// (bench/streams/run.py writes the file), with its algorithm. Of the floor the fastest of the same
// shapes. --resident: how many kernels of a rank fit on its SMs at once: with 2 the next one starts
// early (PDL), with 1 a launch has twice the blocks, and none starts early; "/full" marks those.
// --rounds: how often all are measured in turn; a line is of the replays of all rounds. --trigger:
// when a kernel lets the next one start (0 never, 1 at its start, 2 after its pushes). --json: all
// numbers, in the schema of bench/README.md. Outputs of all ways must have the same bits, or the
// program fails. timing.cuh says how it is timed.
#include <algorithm>
#include <cstdio>
#include <map>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "gpus.h"
#include "options.h"
#include "placement.h"
#include "report.h"
#include "ways.h"
#include "world.cuh"

using namespace gan;
using namespace gan::streams;

namespace {

using Outputs = std::vector<std::vector<char>>;  // of each rank

// What all shapes of a kernel must give.
void require_same(const Outputs& got, Outputs& expected) {
  if (expected.empty()) expected = got;
  if (got != expected) throw std::runtime_error("streams: two shapes gave different bits");
}

void measure_floors(World& world, uint32_t rows, std::vector<Way>& floors) {
  Outputs expected;
  for (Way& floor : floors) {
    floor.add(world.floor_us(rows, floor.rule));
    require_same(world.outputs(rows), expected);
  }
}

// All ranks have the same residual, so they give the same, too.
void measure(World& world, uint32_t rows, std::vector<Way>& ways) {
  Outputs expected;
  for (Way& way : ways) {
    way.add(world.fused_us(rows, way.rule));
    const Outputs got = world.outputs(rows);
    if (std::count(got.begin(), got.end(), got[0]) != static_cast<std::ptrdiff_t>(got.size()))
      throw std::runtime_error("streams: ranks with the same residual gave different bits");
    require_same(got, expected);
  }
}

// The calls of a size, all ways in turn, and the report of them.
void measure_size(const Options& o, const Placement& placement, World& world, uint32_t rows,
                  std::vector<Way> ways, double copy_gb_s, Report& report) {
  std::vector<Way> floors = floors_of(o, placement.share());
  for (uint32_t round = 0; round < o.rounds; ++round) {
    measure_floors(world, rows, floors);
    measure(world, rows, ways);
  }
  const Way& floor =
      *std::min_element(floors.begin(), floors.end(),
                        [](const Way& a, const Way& b) { return median(a.us) < median(b.us); });
  const double floor_us = median(floor.us);
  report.add(placement, rows, floor, floor_us, copy_gb_s);
  for (const Way& way : ways) report.add(placement, rows, way, floor_us, copy_gb_s);
  report.write(false);
}

void run(const Options& o) {
  const uint32_t most_ranks = *std::max_element(o.ranks.begin(), o.ranks.end());
  const uint32_t most_rows = *std::max_element(o.rows.begin(), o.rows.end());
  const DeviceInfo device = open_gpus(std::min(o.gpus, most_ranks));
  if (o.only_device) {
    std::printf("%d %d %d\n", device.multiprocessors, device.major, device.minor);
    return;
  }
  Report report(o, device);
  report.write(false);  // a file that cannot be written is found before the measurement
  std::map<uint32_t, std::vector<PlanRule>> planned;
  if (!o.rules.empty()) planned = read_rules(o.rules);
  for (uint32_t ranks : o.ranks) {
    const Placement placement = placed(ranks, o.gpus, device.multiprocessors);
    World world(placement, form_of(o.form), o.hidden, most_rows);
    const double copy_gb_s = world.copy_gb_s();
    for (uint32_t rows : o.rows) {
      std::vector<Way> ways = ways_of(o, placement.share());
      if (planned.count(ranks) != 0) {
        const PlanRule& chosen = choose(planned[ranks], rows, o.hidden / kPackElements);
        ways.push_back({"plan", kAlgorithmNames[static_cast<uint32_t>(chosen.algorithm)], chosen});
      }
      measure_size(o, placement, world, rows, std::move(ways), copy_gb_s, report);
    }
  }
  report.write(true);
}

}  // namespace

int main(int argc, char** argv) {
  try {
    run(parse(argc, argv));
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return 0;
}
