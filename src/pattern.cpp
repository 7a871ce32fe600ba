// What a problem attends to as a table, by definition.
#include <fmt/format.h>

#include "dilated/error.h"
#include "dilated/problem.h"

#include "src/geometry.h"

namespace dilated {

std::vector<std::int32_t> attention_pattern(const Problem& problem, std::int64_t head) {
  validate(problem);
  const bool whole = problem.cu_seqlens.empty() && problem.windows.empty();
  if (!whole || problem.seqlen > 4096) {
    raise<InvalidProblem>({"attention_pattern", "seqlen", "<= 4096, neither packed nor windows",
                           whole ? fmt::format("{}", problem.seqlen) : "cu_seqlens or windows",
                           "the table has seqlen^2 entries"});
  }
  if (head < 0 || head >= problem.num_heads) {
    raise<InvalidProblem>({"attention_pattern", "head",
                           fmt::format("0 <= head < num_heads = {}", problem.num_heads),
                           fmt::format("{}", head), ""});
  }
  const std::int64_t n = problem.seqlen;
  std::vector<std::int32_t> table(static_cast<std::size_t>(n * n), 0);
  for (const Branch& branch : problem.branches) {
    const std::int64_t offset = branch.offsets[static_cast<std::size_t>(head)];
    for (std::int64_t p = 0; p < n; ++p) {
      const BranchGeometry geometry(n, branch.segment, branch.dilation);
      if (!geometry.covers(p, offset)) {
        continue;
      }
      const std::int64_t s = p / geometry.segment;
      for (std::int64_t i = 0; i < geometry.rows(s, offset); ++i) {
        const std::int64_t j = geometry.position(s, offset, i);
        if (!problem.is_causal || j <= p) {
          ++table[static_cast<std::size_t>(p * n + j)];
        }
      }
    }
  }
  return table;
}

}  // namespace dilated
