// What the engine's tests of itself are made of. Their kernels are their own, so that they test the
// engine and nothing else.
#pragma once
#include <functional>
#include <string>

#include "emulator.h"

namespace gan::emulator {

// Prints a line, and counts. The body throws where it fails.
void test(const char* name, const std::function<void()>& body);
void check(bool is_so, const std::string& what);

// Runs what is launched in a World. "", or the Failure.
std::string outcome(uint32_t ranks, const Options& options,
                    const std::function<void(World&)>& launch);
// The options of a seed; all schedules come up.
Options seeded(uint64_t seed);
// With weak memory.
Options weak(const Options& given);
// Whether it is so for some seed, and for all.
bool for_some_seed(const std::function<bool(const Options&)>& is_so);
bool for_every_seed(const std::function<bool(const Options&)>& is_so);

// 4 bytes with .sys scope, of which gpu.cuh has none: for ranks among themselves.
inline uint32_t load_word(const uint32_t* from, Site site = Site::here()) {
  uint32_t words[1];
  load_relaxed(Scope::kSystem, from, words, site);
  return words[0];
}
inline void store_word(uint32_t* to, uint32_t value, Site site = Site::here()) {
  const uint32_t words[] = {value};
  store_relaxed(Scope::kSystem, to, words, site);
}

Launch shape(uint32_t rank, uint32_t blocks, uint32_t threads);
// Until the word is not 0.
inline uint32_t poll(const uint32_t* word, Site site = Site::here()) {
  uint32_t value = 0;
  while (value == 0) value = load_word(word, site);
  return value;
}

bool has(const std::string& text, const std::string& part);

// Each of these in engine_test_<its name>.cpp.
void test_launches();
void test_waiting();
void test_time();
void test_clusters();
void test_memory();
void test_races();
void test_arithmetic();
void test_explorer();

}  // namespace gan::emulator
