// Questions about all branches of a problem together.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <vector>

#include "dilated/problem.h"

#include "src/geometry.h"

namespace dilated {

/// Number of branches that cover position p of a sequence of length n for query head `head`.
inline int covering_branches(const Problem& problem, std::int64_t n, std::int64_t head,
                             std::int64_t p) {
  return static_cast<int>(
      std::count_if(problem.branches.begin(), problem.branches.end(), [&](const Branch& branch) {
        return BranchGeometry(n, branch.segment, branch.dilation)
            .covers(p, branch.offsets[static_cast<std::size_t>(head)]);
      }));
}

/// Branch numbers in ascending order of segment length; equal ones keep their order.
inline std::vector<std::size_t> ascending_branches(const Problem& problem) {
  std::vector<std::size_t> order(problem.branches.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) {
    const std::int64_t first = problem.branches[a].segment;
    const std::int64_t second = problem.branches[b].segment;
    return first != second ? first < second : a < b;
  });
  return order;
}

}  // namespace dilated
