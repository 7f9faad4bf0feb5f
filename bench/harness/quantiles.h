// What the C++ benchmarks make of the times of replays.
#pragma once
#include <algorithm>
#include <vector>

namespace gan {

// As Python's statistics.quantiles(method="inclusive") has it: between the two nearest values.
inline double quantile(std::vector<double> values, double part) {
  std::sort(values.begin(), values.end());
  const double at = part * (values.size() - 1);
  const size_t below = static_cast<size_t>(at);
  const size_t above = std::min(below + 1, values.size() - 1);
  return values[below] + (at - below) * (values[above] - values[below]);
}

inline double median(const std::vector<double>& values) { return quantile(values, 0.5); }

}  // namespace gan
