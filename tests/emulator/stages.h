// The stages: each runs many cases of one kind, a seed a case.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "cases.h"

namespace gan::testing {

struct Stage {
  const char* name;
  const char* what;
  const char* build;  // flavour of the Makefile
  uint32_t cases;     // unless the command line says how many
  Limits limits;
  // One case. Empty, or what is wrong. `description`: what the case is.
  std::string (*run)(uint64_t seed, const Limits& limits, std::string& description);
};

const std::vector<Stage>& stages();

// debug_cases.cpp, fault_cases.cpp, mixed_cases.cpp, and exploration.cpp, whose cases are numbered
// from 0
std::string run_debug_case(uint64_t seed, const Limits& limits, std::string& description);
std::string run_fault_case(uint64_t seed, const Limits& limits, std::string& description);
std::string run_mixed_case(uint64_t seed, const Limits& limits, std::string& description);
std::string run_exploration(uint64_t number, const Limits& limits, std::string& description);
uint32_t exploration_count();

}  // namespace gan::testing
