// The command line and the file of --rules. Host only.
#pragma once
#include <algorithm>
#include <charconv>
#include <cstdint>
#include <fstream>
#include <iterator>
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

// Of a number: from `least` to `most`, a multiple of `step`.
struct Range {
  uint32_t least, most, step = 1;
};

inline uint32_t number(const std::string& option, const std::string& text, Range range) {
  uint32_t value = 0;
  const char* end = text.data() + text.size();
  const auto [stop, error] = std::from_chars(text.data(), end, value);
  if (error != std::errc() || stop != end || value < range.least || value > range.most ||
      value % range.step != 0) {
    const std::string what =
        range.step == 1 ? "a whole number" : "a multiple of " + std::to_string(range.step);
    throw std::runtime_error(option + ": " + what + " from " + std::to_string(range.least) +
                             " to " + std::to_string(range.most) + " is required; got " + text);
  }
  return value;
}

// One at least.
inline std::vector<uint32_t> numbers(const std::string& option, const std::string& text,
                                     Range range) {
  std::vector<uint32_t> list;
  for (const std::string& word : words_of(text)) list.push_back(number(option, word, range));
  if (list.empty()) number(option, "", range);
  return list;
}

inline std::string name_of(const std::string& option, const std::string& text,
                           const std::vector<std::string>& known) {
  if (std::find(known.begin(), known.end(), text) != known.end()) return text;
  std::string names;
  for (const std::string& name : known) names += (names.empty() ? "" : ", ") + name;
  throw std::runtime_error(option + ": one of " + names + " is required; got " + text);
}

inline std::vector<std::string> names_of(const std::string& option, const std::string& text,
                                         const std::vector<std::string>& known) {
  std::vector<std::string> list;
  for (const std::string& word : words_of(text)) list.push_back(name_of(option, word, known));
  if (list.empty()) name_of(option, "", known);
  return list;
}

// A rule of the plan, in a line of ten numbers (plan.Rule.numbers).
inline PlanRule read_rule(const std::string& line) {
  std::stringstream words(line);
  uint32_t f[10];
  for (uint32_t& field : f) words >> field;
  constexpr size_t kAlgorithms = std::size(kAlgorithmNames);
  if (!words || f[3] >= kAlgorithms || f[7] > static_cast<uint32_t>(Trigger::kAfterPush)) {
    throw std::runtime_error(
        "--rules: ten numbers a line are required, the fourth an algorithm and the eighth a "
        "trigger; got " +
        line);
  }
  return {f[0], f[1], f[2], Algorithm{f[3]}, f[4], f[5], f[6], Trigger{f[7]}, f[8], f[9]};
}

// Lines "ranks N", each before the rules for so many.
inline std::map<uint32_t, std::vector<PlanRule>> read_rules(const std::string& path) {
  std::map<uint32_t, std::vector<PlanRule>> rules;
  std::ifstream file(path);
  if (!file) throw std::runtime_error("--rules: a readable file is required; got " + path);
  uint32_t ranks = 0;
  for (std::string line; std::getline(file, line);) {
    const std::string word = "ranks ";
    if (line.rfind(word, 0) == 0) {
      ranks = number("--rules: ranks", line.substr(word.size()), {2, kMaxRanks});
    } else if (ranks == 0) {
      throw std::runtime_error("--rules: a line \"ranks N\" is required first; got " + line);
    } else {
      rules[ranks].push_back(read_rule(line));
    }
  }
  return rules;
}

struct Options {
  std::vector<uint32_t> ranks{2, 4, 8}, rows{1, 8, 64}, teams{1, 2, 4, 8}, leads{1}, resident{2, 1};
  std::vector<std::string> algorithms{"one_shot", "two_shot"};
  uint32_t hidden = 4096, threads = 512, trigger = 2, rounds = 1, gpus = 1;
  std::string form = "residual", rules, json;
  bool only_device = false;
};

inline Options parse(int argc, char** argv) {
  constexpr uint32_t kMany = 1 << 20, kWarp = 32, kPackElements = kPackBytes / 2;  // of bf16
  Options o;
  for (int i = 1; i < argc; i += 2) {
    const std::string name = argv[i];
    if (i + 1 == argc) throw std::runtime_error(name + ": a value is required; got none");
    const std::string value = argv[i + 1];
    if (name == "--ranks") {
      o.ranks = numbers(name, value, {2, kMaxRanks});
    } else if (name == "--hidden") {
      o.hidden = number(name, value, {kPackElements, kMaxHidden, kPackElements});
    } else if (name == "--rows") {
      o.rows = numbers(name, value, {1, kMany});
    } else if (name == "--teams") {
      o.teams = numbers(name, value, {1, 8});
    } else if (name == "--leads") {
      o.leads = numbers(name, value, {1, kMany});
    } else if (name == "--algorithms") {
      o.algorithms =
          names_of(name, value, {std::begin(kAlgorithmNames), std::end(kAlgorithmNames)});
    } else if (name == "--resident") {
      o.resident = numbers(name, value, {1, 2});
    } else if (name == "--threads") {
      o.threads = number(name, value, {kWarp, kMaxThreadsAMultiprocessor / 2, kWarp});
    } else if (name == "--gpus") {
      o.gpus = number(name, value, {1, kMany});
    } else if (name == "--rounds") {
      o.rounds = number(name, value, {1, kMany});
    } else if (name == "--trigger") {
      o.trigger = number(name, value, {0, 2});
    } else if (name == "--device") {
      o.only_device = true;
    } else if (name == "--form") {
      o.form = name_of(name, value, {"plain", "residual", "sandwich"});
    } else if (name == "--rules") {
      o.rules = value;
    } else if (name == "--json") {
      o.json = value;
    } else {
      throw std::runtime_error(name + ": an option of streams.cu, see its top, is required");
    }
  }
  for (const uint32_t teams : o.teams) {
    if ((teams & (teams - 1)) != 0)
      throw std::runtime_error("--teams: powers of two are required; got " + std::to_string(teams));
  }
  return o;
}

}  // namespace gan::streams
