// Every order of accesses that can matter, one execution each: that no order of a small case fails.
//
// Orders that differ only in accesses that do not conflict give the same, so one of them is run:
// dynamic partial-order reduction with source sets and sleep sets (Abdulla, Aronis, Jonsson,
// Sagonas, Optimal dynamic partial order reduction, POPL 2014). Nor is a poll an access that would
// read what it read last. And only contended words count, those that are accessed without being
// put in order by barriers and kernel boundaries: it starts with none, and begins again where an
// execution finds one. As long as there is none, the order of accesses of a word is always the
// same.
//
// What is not explored: old values (Options::weak), torn accesses, when blocks start, and when
// stores of store_counted arrive.
#pragma once
#include <cstdint>
#include <functional>
#include <string>

#include "engine.h"

namespace gan::emulator {

struct ExploreResult {
  bool complete = false;  // nothing is left to explore
  std::string failure;    // of the execution that failed; there it ends
  // With all contended words known:
  uint64_t executions = 0;
  uint64_t pruned = 0;  // given up in the middle: they would have been like others
  size_t depth = 0;     // the longest path, in accesses
  size_t contended_words = 0;
  uint32_t beginnings = 0;  // each with more contended words
  double seconds = 0;
};

// run_once runs a case from its start in a World with these options, always with the same memory,
// and returns "", or what is wrong. It lets Pruned pass.
ExploreResult explore(const std::function<std::string(const Options&)>& run_once, double seconds);

}  // namespace gan::emulator
