// What is printed, and the file of --json, in the schema of bench/README.md.
#pragma once
#include <algorithm>
#include <cstdio>
#include <ctime>
#include <fstream>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "harness/quantiles.h"
#include "host/workspace.h"
#include "options.h"
#include "placement.h"
#include "timing.cuh"
#include "ways.h"

namespace gan::streams {

inline std::string quoted(const std::string& text) {
  std::string result = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') result += '\\';
    result += c;
  }
  return result + "\"";
}

class Report {
 public:
  Report(const Options& o, const DeviceInfo& device) : o_(o), device_(device) {
    for (const uint32_t ranks : o.ranks) {
      const Placement placement = placed(ranks, o.gpus, device.multiprocessors);
      gpus_ = std::max(gpus_, placement.gpus);
      const std::string words = placement.words();
      if (placement_.find(words) == std::string::npos)
        placement_ += (placement_.empty() ? "" : "; ") + words;
    }
    std::printf("%u x %s, %s, %s, graphs of %d calls, us a call\n", gpus_, device.name.c_str(),
                driver_status().c_str(), placement_.c_str(), kCallsAGraph);
    std::printf("%5s  %6s  %4s  %-5s  %-8s  %-16s  %-8s  %8s  %8s  %8s  %6s\n", "ranks", "hidden",
                "rows", "dtype", "form", "algorithm", "path", "us", "p10", "p90", "/floor");
  }

  void add(const Placement& placement, uint32_t rows, const Way& way, double floor,
           double copy_gb_s) {
    const double us = median(way.us), p10 = quantile(way.us, 0.1), p90 = quantile(way.us, 0.9);
    std::printf("%5u  %6u  %4u  %-5s  %-8s  %-16s  %-8s  %8.2f  %8.2f  %8.2f  %6.2f\n",
                placement.ranks, o_.hidden, rows, "bf16", o_.form.c_str(), way.name.c_str(),
                way.path.c_str(), us, p10, p90, us / floor);
    std::fflush(stdout);
    std::ostringstream cell;
    cell << "{\"ranks\": " << placement.ranks << ", \"hidden\": " << o_.hidden
         << ", \"rows\": " << rows << ", \"dtype\": \"bf16\", \"form\": " << quoted(o_.form)
         << ", \"algorithm\": " << quoted(way.name) << ", \"path\": " << quoted(way.path)
         << ", \"us\": " << us << ", \"p10\": " << p10 << ", \"p90\": " << p90
         << ", \"captured\": true, \"multiprocessors\": " << placement.share()
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
         << ",\n \"gpu\": " << quoted(device_.name) << ",\n \"gpus\": " << gpus_
         << ",\n \"driver\": null"
         << ",\n \"versions\": {\"gemma_ar_norm\": " << quoted(GAN_VERSION)
         << ", \"cuda\": " << quoted(driver_status())
         << "},\n \"placement\": " << quoted(placement_)
         << ",\n \"backend\": \"pointers\",\n \"start\": "
         << quoted(gpus_ == 1 ? "one graph forks to all ranks"
                              : "on the device: a fused call of one row")
         << ",\n \"l2\": \"warm\",\n \"calls\": " << kCallsAGraph
         << ",\n \"replays\": " << kReplays * o_.rounds
         << ",\n \"options\": {\"threads\": " << o_.threads << ", \"trigger\": " << o_.trigger
         << "}"
         << ",\n \"seed\": null,\n \"environment\": {},\n \"skipped\": [],\n \"cells\": [";
    for (size_t i = 0; i < cells_.size(); ++i) file << (i == 0 ? "\n  " : ",\n  ") << cells_[i];
    file << "\n ]\n}\n";
    if (!file.flush())
      throw std::runtime_error("--json: a writable file is required; got " + o_.json);
  }

 private:
  const Options& o_;
  const DeviceInfo& device_;
  uint32_t gpus_ = 0;
  std::string placement_;  // of all numbers of ranks
  std::vector<std::string> cells_;
};

}  // namespace gan::streams
