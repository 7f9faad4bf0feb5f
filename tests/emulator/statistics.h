// What the cases of a run are like, counted, so that a stage that no longer reaches something
// shows: tests/cpu/test_emulator.py asks for shares.
#pragma once
#include <string>

#include "cases.h"

namespace gan::testing {

void count(const std::string& what);
void count_case(const Case& c);

// A line: "cases 300, launches 1021, ...".
std::string statistics();

}  // namespace gan::testing
