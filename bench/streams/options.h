// The command line and the file of --rules. Host only.
#pragma once
#include <algorithm>
#include <cstdint>
#include <fstream>
#include <map>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "device/params.h"
#include "host/plan.h"

namespace gan::streams {

inline std::vector<std::string> words_of(const std::string& text) {
  std::vector<std::string> list;
  std::stringstream stream(text);
  for (std::string item; std::getline(stream, item, ',');) list.push_back(item);
  return list;
}
inline std::vector<uint32_t> numbers(const std::string& text) {
  std::vector<uint32_t> list;
  for (const std::string& word : words_of(text)) list.push_back(std::stoul(word));
  return list;
}

// Blocks of a line "ranks N" and its rules, a line of numbers each (plan.Rule.numbers).
inline std::map<uint32_t, std::vector<PlanRule>> read_rules(const std::string& path) {
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
  uint32_t hidden = 4096, threads = 512, trigger = 2, rounds = 1, gpus = 1;
  std::string form = "residual", rules, json;
  bool only_multiprocessors = false;
};

inline Options parse(int argc, char** argv) {
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
    } else if (name == "--gpus") {
      o.gpus = std::stoul(value);
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
  const auto is_possible = [](uint32_t ranks) { return ranks >= 2 && ranks <= kMaxRanks; };
  if (o.ranks.empty() || !std::all_of(o.ranks.begin(), o.ranks.end(), is_possible))
    throw std::runtime_error("--ranks: numbers from 2 to " + std::to_string(kMaxRanks) +
                             " are required");
  if (o.gpus == 0) throw std::runtime_error("--gpus: 1 or more are required; got 0");
  return o;
}

}  // namespace gan::streams
