// The yardstick: N ranks as N streams of one process on one GPU, each with an equal share of its
// SMs. A graph of dependent calls of the product's own kernels, microseconds a call, beside the
// floor: the residual add and norm alone, in the same share of the SMs. No torch, no Python.
//
//   streams [--ranks 2,4,8] [--hidden 4096] [--rows 1,8,64] [--form plain|residual|sandwich]
//           [--algorithms one_shot,two_shot] [--teams 1,2,4,8] [--leads 1] [--resident 2,1]
//           [--threads 512] [--trigger 0|1|2] [--rounds 1] [--rules FILE] [--json FILE] [--sms -]
//
// --sms prints the number of multiprocessors and ends. A line for each algorithm, number of blocks
// a team, and lead of the pushes (two-shot), and one for the plan with --rules
// (bench/streams/run.py writes the file), with its algorithm. --resident: how many kernels of a
// rank fit on its SMs at once: with 2 the next one starts early (PDL), with 1 a launch has twice
// the blocks, and none starts early; "/full" marks those. --rounds: how often all are measured in
// turn; a line is of the replays of all rounds. --json: all numbers, in the schema of
// bench/README.md. Outputs of all ways must have the same bits, or the program fails.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <fstream>
#include <map>
#include <memory>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "host/cuda_status.h"
#include "host/launch.h"
#include "host/workspace.h"

using namespace gan;

namespace {

constexpr int kCallsAGraph = 20;
constexpr int kWarmUps = 5, kReplays = 30;
constexpr size_t kCopyBytes = 64 << 20;  // of a rank: more than an L2 has, with 2 ranks too
constexpr uint64_t kTimeoutNs = 10ull * 1000 * 1000 * 1000;
using Element = __nv_bfloat16;
constexpr uint32_t kPackElements = 16 / sizeof(Element);

void check(cudaError_t status) {
  check_cuda(status, "streams: a CUDA call that works is required");
}

// ---- memory ----

__global__ void fill(Element* data, size_t count, uint32_t seed, float scale) {
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < count;
       i += size_t{gridDim.x} * blockDim.x) {
    uint32_t h = static_cast<uint32_t>(i) * 2654435761u ^ seed * 40503u;
    h = (h ^ h >> 16) * 0x85ebca6bu;
    h = (h ^ h >> 13) * 0xc2b2ae35u;
    h ^= h >> 16;
    data[i] = __float2bfloat16(scale * (static_cast<float>(h & 0xffff) / 32768.0f - 1.0f));
  }
}

__global__ void copy(const uint4* from, uint4* to, size_t count) {
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < count;
       i += size_t{gridDim.x} * blockDim.x)
    to[i] = from[i];
}

class Array {
 public:
  Array(size_t count, uint32_t seed, float scale) : count_(count) {
    check(cudaMalloc(&data_, count * sizeof(Element)));
    fill<<<256, 256>>>(data_, count, seed, scale);
    check(cudaGetLastError());
  }
  ~Array() { cudaFree(data_); }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;

  Element* data() const { return data_; }
  void poison() { check(cudaMemset(data_, 0xff, count_ * sizeof(Element))); }
  std::vector<char> bytes(size_t count) const {
    std::vector<char> host(count * sizeof(Element));
    check(cudaMemcpy(host.data(), data_, host.size(), cudaMemcpyDeviceToHost));
    return host;
  }

 private:
  Element* data_ = nullptr;
  size_t count_;
};

struct RankData {
  Array x, residual, norm_out, residual_out;
  RankData(uint32_t rank, size_t count)
      : x(count, 11 + rank, 1.0f),
        residual(count, 99, 1.0f),
        norm_out(count, 0, 0.0f),
        residual_out(count, 0, 0.0f) {}
};

// ---- statistics ----

// As Python's statistics.quantiles(method="inclusive") has it: between the two nearest values.
double quantile(std::vector<double> values, double part) {
  std::sort(values.begin(), values.end());
  const double at = part * (values.size() - 1);
  const size_t below = static_cast<size_t>(at);
  const size_t above = std::min(below + 1, values.size() - 1);
  return values[below] + (at - below) * (values[above] - values[below]);
}

double median(const std::vector<double>& values) { return quantile(values, 0.5); }

// ---- a world of ranks ----

enum class Form { kPlain, kResidual, kSandwich };

struct Problem {
  uint32_t ranks, hidden, max_rows, multiprocessors;
  Form form;
};

class World {
 public:
  explicit World(const Problem& problem)
      : problem_(problem), weight_(problem.hidden, 7, 0.3f), post_weight_(problem.hidden, 8, 0.3f) {
    for (uint32_t r = 0; r < problem.ranks; ++r) {
      data_.push_back(std::make_unique<RankData>(r, size_t{problem.max_rows} * problem.hidden));
      cudaStream_t stream;
      check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
      streams_.push_back(stream);
    }
    check(preload_kernels(1));
    check(cudaDeviceSynchronize());
  }
  ~World() {
    for (cudaStream_t stream : streams_) cudaStreamDestroy(stream);
  }

  // What a rank reads and writes in a second while all ranks copy, each with blocks for its share.
  double copy_gb_s() {
    constexpr size_t kElements = kCopyBytes / sizeof(Element);
    std::vector<std::unique_ptr<Array>> from, to;
    for (uint32_t r = 0; r < problem_.ranks; ++r) {
      from.push_back(std::make_unique<Array>(kElements, r, 1.0f));
      to.push_back(std::make_unique<Array>(kElements, r, 0.0f));
    }
    check(cudaDeviceSynchronize());
    constexpr uint32_t kThreads = 512, kBlocksAMultiprocessor = 2048 / kThreads;
    const double us = median(times_us([&](uint32_t r) {
      copy<<<problem_.multiprocessors * kBlocksAMultiprocessor, kThreads, 0, streams_[r]>>>(
          reinterpret_cast<const uint4*>(from[r]->data()), reinterpret_cast<uint4*>(to[r]->data()),
          kCopyBytes / sizeof(uint4));
      check(cudaGetLastError());
    }));
    return 2.0 * kCopyBytes / us / 1e3;
  }

  // The epilogue alone, in a rank's share of the SMs. Microseconds a call, of each replay.
  std::vector<double> floor_us(uint32_t rows, const PlanRule& rule) {
    return times_us([&](uint32_t r) {
      LocalNormParams params{call(r, rows).row, rule.trigger};
      const LaunchShape shape = shape_of(rule, rows, params.row.row_packs);
      params.row.rows = rows;
      params.row.packs_a_thread = shape.packs_a_thread;
      check(launch_local_norm(DType::kBFloat16, params, shape, streams_[r]));
    });
  }

  std::vector<double> fused_us(uint32_t rows, const std::vector<PlanRule>& rules) {
    const uint64_t bytes = inbox_bytes(problem_.ranks, problem_.max_rows, problem_.max_rows,
                                       problem_.hidden * sizeof(Element));
    std::vector<std::shared_ptr<Workspace>> workspaces;
    for (uint32_t r = 0; r < problem_.ranks; ++r) {
      workspaces.push_back(
          std::make_shared<Workspace>(0, r, problem_.ranks, bytes, kTimeoutNs, rules));
    }
    for (auto& w : workspaces) w->connect_local(workspaces);
    for (auto& d : data_) {
      d->norm_out.poison();
      d->residual_out.poison();
    }
    check(cudaDeviceSynchronize());
    const std::vector<double> us =
        times_us([&](uint32_t r) { workspaces[r]->run(call(r, rows), streams_[r]); });
    for (auto& w : workspaces) {
      if (w->failure())
        throw std::runtime_error(
            "streams: a call ran into its deadline; do all blocks fit at once?");
    }
    for (auto& w : workspaces) w->close();
    return us;
  }

  // Of the last fused call, norm_out and residual_out; all ranks' alike, since they have the same
  // residual.
  std::vector<char> outputs(uint32_t rows) {
    const size_t count = size_t{rows} * problem_.hidden;
    std::vector<char> first;
    for (auto& d : data_) {
      std::vector<char> both = d->norm_out.bytes(count);
      const std::vector<char> residual_out = d->residual_out.bytes(count);
      both.insert(both.end(), residual_out.begin(), residual_out.end());
      if (first.empty()) first = both;
      if (both != first)
        throw std::runtime_error("streams: ranks with the same residual gave different bits");
    }
    return first;
  }

 private:
  CallArguments call(uint32_t r, uint32_t rows) const {
    const RankData& d = *data_[r];
    RowParams row{};
    row.x = d.x.data();
    row.residual = problem_.form == Form::kPlain ? nullptr : d.residual.data();
    row.weight = weight_.data();
    row.post_weight = problem_.form == Form::kSandwich ? post_weight_.data() : nullptr;
    row.norm_out = d.norm_out.data();
    row.residual_out = d.residual_out.data();
    row.row_packs = problem_.hidden / kPackElements;
    row.hidden = static_cast<float>(problem_.hidden);
    row.hidden_reciprocal = 1.0f / row.hidden;
    row.eps = 1e-6f;
    row.weight_bias = 1.0f;
    return {DType::kBFloat16, rows, row, std::nullopt};
  }

  // Of the replays of a graph in which every rank's stream has kCallsAGraph calls, microseconds a
  // call until the slowest rank is done.
  template <class Launch>
  std::vector<double> times_us(Launch launch) {
    for (int i = 0; i < 3; ++i) launch_all(launch);
    check(cudaDeviceSynchronize());
    cudaEvent_t fork, join, begin, end;
    for (cudaEvent_t* event : {&fork, &join, &begin, &end}) check(cudaEventCreate(event));
    check(cudaStreamBeginCapture(streams_[0], cudaStreamCaptureModeRelaxed));
    check(cudaEventRecord(fork, streams_[0]));
    for (size_t r = 1; r < streams_.size(); ++r) check(cudaStreamWaitEvent(streams_[r], fork));
    for (int i = 0; i < kCallsAGraph; ++i) launch_all(launch);
    for (size_t r = 1; r < streams_.size(); ++r) {
      check(cudaEventRecord(join, streams_[r]));
      check(cudaStreamWaitEvent(streams_[0], join));
    }
    cudaGraph_t graph;
    cudaGraphExec_t executable;
    check(cudaStreamEndCapture(streams_[0], &graph));
    check(cudaGraphInstantiate(&executable, graph, 0));
    std::vector<double> us;
    for (int i = 0; i < kWarmUps + kReplays; ++i) {
      check(cudaEventRecord(begin, streams_[0]));
      check(cudaGraphLaunch(executable, streams_[0]));
      check(cudaEventRecord(end, streams_[0]));
      check(cudaEventSynchronize(end));
      float ms = 0;
      check(cudaEventElapsedTime(&ms, begin, end));
      if (i >= kWarmUps) us.push_back(ms * 1e3 / kCallsAGraph);
    }
    check(cudaGraphExecDestroy(executable));
    check(cudaGraphDestroy(graph));
    for (cudaEvent_t event : {fork, join, begin, end}) check(cudaEventDestroy(event));
    return us;
  }

  template <class Launch>
  void launch_all(Launch launch) {
    for (uint32_t r = 0; r < problem_.ranks; ++r) launch(r);
  }

  Problem problem_;
  Array weight_, post_weight_;
  std::vector<std::unique_ptr<RankData>> data_;
  std::vector<cudaStream_t> streams_;
};

// ---- the command line ----

std::vector<std::string> words_of(const std::string& text) {
  std::vector<std::string> list;
  std::stringstream stream(text);
  for (std::string item; std::getline(stream, item, ',');) list.push_back(item);
  return list;
}
std::vector<uint32_t> numbers(const std::string& text) {
  std::vector<uint32_t> list;
  for (const std::string& word : words_of(text)) list.push_back(std::stoul(word));
  return list;
}

// Blocks of a line "ranks N" and its rules, a line of numbers each (plan.Rule.numbers).
std::map<uint32_t, std::vector<PlanRule>> read_rules(const std::string& path) {
  std::map<uint32_t, std::vector<PlanRule>> rules;
  std::ifstream file(path);
  if (!file) throw std::runtime_error("--rules: a readable file is required; got " + path);
  uint32_t ranks = 0;
  for (std::string line; std::getline(file, line);) {
    std::stringstream words(line);
    if (line.rfind("ranks", 0) == 0) {
      words >> line >> ranks;
      continue;
    }
    uint32_t f[10];
    for (uint32_t& field : f) words >> field;
    if (!words) throw std::runtime_error("--rules: ten numbers a line are required; got " + line);
    rules[ranks].push_back(
        {f[0], f[1], f[2], Algorithm{f[3]}, f[4], f[5], f[6], Trigger{f[7]}, f[8], f[9]});
  }
  return rules;
}

struct Options {
  std::vector<uint32_t> ranks{2, 4, 8}, rows{1, 8, 64}, teams{1, 2, 4, 8}, leads{1}, resident{2, 1};
  std::vector<std::string> algorithms{"one_shot", "two_shot"};
  uint32_t hidden = 4096, threads = 512, trigger = 1, rounds = 1;
  std::string form = "residual", rules, json;
  bool only_multiprocessors = false;
};

Options parse(int argc, char** argv) {
  Options o;
  for (int i = 1; i < argc; i += 2) {
    const std::string name = argv[i];
    if (i + 1 == argc) throw std::runtime_error(name + ": a value is required; got none");
    const std::string value = argv[i + 1];
    if (name == "--ranks") {
      o.ranks = numbers(value);
    } else if (name == "--rows") {
      o.rows = numbers(value);
    } else if (name == "--teams") {
      o.teams = numbers(value);
    } else if (name == "--leads") {
      o.leads = numbers(value);
    } else if (name == "--algorithms") {
      o.algorithms = words_of(value);
    } else if (name == "--resident") {
      o.resident = numbers(value);
    } else if (name == "--hidden") {
      o.hidden = std::stoul(value);
    } else if (name == "--threads") {
      o.threads = std::stoul(value);
    } else if (name == "--rounds") {
      o.rounds = std::stoul(value);
    } else if (name == "--trigger") {
      o.trigger = std::stoul(value);
    } else if (name == "--sms") {
      o.only_multiprocessors = true;
    } else if (name == "--form") {
      o.form = value;
    } else if (name == "--rules") {
      o.rules = value;
    } else if (name == "--json") {
      o.json = value;
    } else {
      throw std::runtime_error(name + ": no such option; see the top of streams.cu");
    }
  }
  return o;
}

PlanRule rule_of(const Options& o, uint32_t share, Algorithm algorithm, uint32_t teams,
                 uint32_t lead, uint32_t resident) {
  PlanRule rule{};
  rule.max_rows = rule.max_row_packs = UINT32_MAX;
  rule.max_packs = UINT64_MAX;
  rule.algorithm = algorithm;
  rule.blocks_a_team = teams;
  rule.max_threads = o.threads;
  rule.threads_a_multiprocessor = kMaxThreadsAMultiprocessor / resident;
  rule.trigger = resident == 1 ? Trigger::kNever : Trigger{o.trigger};
  rule.lead_rows = lead;
  rule.multiprocessors = share;
  return rule;
}

bool has(const std::vector<std::string>& list, const char* item) {
  return std::find(list.begin(), list.end(), item) != list.end();
}

Form form_of(const std::string& name) {
  if (name == "plain") return Form::kPlain;
  if (name == "residual") return Form::kResidual;
  if (name == "sandwich") return Form::kSandwich;
  throw std::runtime_error("--form: plain, residual or sandwich is required; got " + name);
}

// A way to do a call, and how long it took in each replay of all rounds.
struct Way {
  std::string name, path;  // path: the algorithm, of the plan
  std::vector<PlanRule> rules;
  std::vector<double> us{};

  void add(const std::vector<double>& more) { us.insert(us.end(), more.begin(), more.end()); }
};

// What is to be measured of calls of a size: all that --algorithms, --teams, ... ask for.
std::vector<Way> ways_of(const Options& o, uint32_t share) {
  std::vector<Way> ways;
  for (uint32_t teams : o.teams) {
    // A row's blocks have a warp of packs each at least, and the team fits into the share.
    if (teams > 1 && (o.hidden / kPackElements / teams < 32 || teams > share)) continue;
    for (uint32_t resident : o.resident) {
      const auto rule = [&](Algorithm algorithm, uint32_t lead) {
        return std::vector<PlanRule>{rule_of(o, share, algorithm, teams, lead, resident)};
      };
      const std::string blocks = "/" + std::to_string(teams), full = resident == 1 ? "/full" : "";
      if (has(o.algorithms, kAlgorithmNames[0]))
        ways.push_back({"one-shot" + blocks + full, "", rule(Algorithm::kOneShot, 1)});
      if (!has(o.algorithms, kAlgorithmNames[1])) continue;
      for (uint32_t lead : o.leads) {
        ways.push_back({"two-shot" + blocks + "/" + std::to_string(lead) + full, "",
                        rule(Algorithm::kTwoShot, lead)});
      }
    }
  }
  return ways;
}

void measure(World& world, uint32_t rows, std::vector<Way>& ways) {
  std::vector<char> expected;
  for (Way& way : ways) {
    way.add(world.fused_us(rows, way.rules));
    const std::vector<char> got = world.outputs(rows);
    if (expected.empty()) expected = got;
    if (got != expected) throw std::runtime_error("streams: two shapes gave different bits");
  }
}

// ---- the report ----

std::string quoted(const std::string& text) {
  std::string result = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') result += '\\';
    result += c;
  }
  return result + "\"";
}

// What is printed, and the file of --json, in the schema of bench/README.md.
class Report {
 public:
  Report(const Options& o, const DeviceInfo& device)
      : o_(o), device_(device), sms_(std::to_string(device.multiprocessors)) {
    std::printf("%s, %s, %s SMs / ranks each, graphs of %d calls, us a call\n", device.name.c_str(),
                driver_status().c_str(), sms_.c_str(), kCallsAGraph);
    std::printf("%5s  %6s  %4s  %-5s  %-8s  %-16s  %-8s  %8s  %8s  %8s  %6s\n", "ranks", "hidden",
                "rows", "dtype", "form", "algorithm", "path", "us", "p10", "p90", "/floor");
  }

  void add(uint32_t ranks, uint32_t rows, const Way& way, double floor, double copy_gb_s) {
    const double us = median(way.us), p10 = quantile(way.us, 0.1), p90 = quantile(way.us, 0.9);
    std::printf("%5u  %6u  %4u  %-5s  %-8s  %-16s  %-8s  %8.2f  %8.2f  %8.2f  %6.2f\n", ranks,
                o_.hidden, rows, "bf16", o_.form.c_str(), way.name.c_str(), way.path.c_str(), us,
                p10, p90, us / floor);
    std::fflush(stdout);
    std::ostringstream cell;
    cell << "{\"ranks\": " << ranks << ", \"hidden\": " << o_.hidden << ", \"rows\": " << rows
         << ", \"dtype\": \"bf16\", \"form\": " << quoted(o_.form)
         << ", \"algorithm\": " << quoted(way.name) << ", \"path\": " << quoted(way.path)
         << ", \"us\": " << us << ", \"p10\": " << p10 << ", \"p90\": " << p90
         << ", \"captured\": true, \"multiprocessors\": " << device_.multiprocessors / ranks
         << ", \"copy_gb_s\": " << copy_gb_s << ", \"wrong\": \"\"}";
    cells_.push_back(cell.str());
  }

  // After every size: of a run that is stopped, what it had is left.
  void write(bool complete) const {
    if (o_.json.empty()) return;
    std::ofstream file(o_.json);
    char date[32];
    const std::time_t now = std::time(nullptr);
    std::strftime(date, sizeof(date), "%Y-%m-%d %H:%M UTC", std::gmtime(&now));
    file << "{\n \"schema\": 1,\n \"harness\": \"streams\",\n \"complete\": "
         << (complete ? "true" : "false") << ",\n \"date\": " << quoted(date)
         << ",\n \"gpu\": " << quoted(device_.name) << ",\n \"gpus\": 1,\n \"driver\": null"
         << ",\n \"versions\": {\"gemma_ar_norm\": " << quoted(GAN_VERSION)
         << ", \"cuda\": " << quoted(driver_status()) << "},\n \"placement\": "
         << quoted("ranks as streams of one process, " + sms_ + "/N SMs each")
         << ",\n \"backend\": \"pointers\",\n \"start\": \"one graph forks to all ranks\""
         << ",\n \"l2\": \"warm\",\n \"calls\": " << kCallsAGraph
         << ",\n \"replays\": " << kReplays * o_.rounds
         << ",\n \"seed\": null,\n \"environment\": {},\n \"skipped\": [],\n \"cells\": [";
    for (size_t i = 0; i < cells_.size(); ++i) file << (i == 0 ? "\n  " : ",\n  ") << cells_[i];
    file << "\n ]\n}\n";
    if (!file.flush())
      throw std::runtime_error("--json: a writable file is required; got " + o_.json);
  }

 private:
  const Options& o_;
  const DeviceInfo& device_;
  const std::string sms_;
  std::vector<std::string> cells_;
};

void run(const Options& o) {
  const DeviceInfo device = device_info(0);
  if (o.only_multiprocessors) {
    std::printf("%d\n", device.multiprocessors);
    return;
  }
  Report report(o, device);
  report.write(false);  // a file that cannot be written is found before the measurement
  std::map<uint32_t, std::vector<PlanRule>> planned;
  if (!o.rules.empty()) planned = read_rules(o.rules);
  for (uint32_t ranks : o.ranks) {
    const uint32_t share = device.multiprocessors / ranks;
    World world(
        {ranks, o.hidden, *std::max_element(o.rows.begin(), o.rows.end()), share, form_of(o.form)});
    const double copy_gb_s = world.copy_gb_s();
    for (uint32_t rows : o.rows) {
      std::vector<Way> ways = ways_of(o, share);
      if (planned.count(ranks) != 0) {
        const PlanRule& chosen = choose(planned[ranks], rows, o.hidden / kPackElements);
        ways.push_back(
            {"plan", kAlgorithmNames[static_cast<uint32_t>(chosen.algorithm)], {chosen}});
      }
      std::vector<Way> floors(o.resident.size(), Way{"floor", "", {}});
      for (uint32_t round = 0; round < o.rounds; ++round) {
        for (size_t i = 0; i < floors.size(); ++i) {
          const PlanRule rule = rule_of(o, share, Algorithm::kOneShot, 1, 1, o.resident[i]);
          floors[i].add(world.floor_us(rows, rule));
        }
        measure(world, rows, ways);
      }
      const Way& floor =
          *std::min_element(floors.begin(), floors.end(),
                            [](const Way& a, const Way& b) { return median(a.us) < median(b.us); });
      const double floor_us = median(floor.us);
      report.add(ranks, rows, floor, floor_us, copy_gb_s);
      for (const Way& way : ways) report.add(ranks, rows, way, floor_us, copy_gb_s);
      report.write(false);
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
