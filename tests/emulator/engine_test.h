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
// Whether it is so for some seed, and for all.
bool for_some_seed(const std::function<bool(const Options&)>& is_so);
bool for_every_seed(const std::function<bool(const Options&)>& is_so);

bool has(const std::string& text, const std::string& part);

void test_scheduling();  // engine_test.cpp
void test_clusters();    // engine_test_clusters.cpp
void test_memory();      // engine_test_memory.cpp
void test_explorer();    // engine_test_explorer.cpp

}  // namespace gan::emulator
