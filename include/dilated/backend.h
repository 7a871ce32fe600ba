// Which implementations exist, and which one a problem would run on and why.
// To force one: `make_plan(problem, name)` or the environment variable DILATED_BACKEND.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "dilated/problem.h"

namespace dilated {

struct BackendInfo {
  std::string name;         // "cpu", "reference", "cuda"
  std::string description;  // for example the SIMD target chosen on this machine
  bool available = true;    // false: not built or no such hardware; `description` says why
};

/// In the order in which `make_plan` asks them.
std::vector<BackendInfo> backends();

/// Several lines: the back end that would run `problem`, and why each other one does not.
/// Throws InvalidProblem for an illegal problem or an unknown forced name.
std::string explain(const Problem& problem, std::string_view backend = {});

}  // namespace dilated
