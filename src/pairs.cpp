// What a problem attends to, counted and as a table: pair counts in closed form, patterns by
// definition.
#include <fmt/format.h>

#include "dilated/error.h"
#include "dilated/problem.h"

#include "src/geometry.h"

namespace dilated {
namespace {

std::int64_t pairs_of_rows(std::int64_t rows, bool is_causal) {
  return is_causal ? rows * (rows + 1) / 2 : rows * rows;
}

/// Pairs of one head in one branch on one sequence: all segments but the last are alike.
std::int64_t pairs_of_head(const BranchGeometry& geometry, std::int64_t offset, bool is_causal) {
  const std::int64_t last = geometry.num_segments() - 1;
  return last * pairs_of_rows(last > 0 ? geometry.rows(0, offset) : 0, is_causal) +
         pairs_of_rows(geometry.rows(last, offset), is_causal);
}

}  // namespace

std::vector<std::int64_t> count_pairs(const Problem& problem) {
  validate(problem);
  std::vector<std::int64_t> lengths;
  std::int64_t repeats = 1;
  if (problem.cu_seqlens.empty()) {
    lengths = {problem.seqlen};
    repeats = problem.batch;
  } else {
    for (std::size_t s = 1; s < problem.cu_seqlens.size(); ++s) {
      lengths.push_back(problem.cu_seqlens[s] - problem.cu_seqlens[s - 1]);
    }
  }
  std::vector<std::int64_t> counts;
  for (const Branch& branch : problem.branches) {
    std::int64_t count = 0;
    for (const std::int64_t length : lengths) {
      if (length == 0) {
        continue;
      }
      const BranchGeometry geometry(length, branch.segment, branch.dilation);
      for (const std::int64_t offset : branch.offsets) {
        count += offset < 0 ? 0 : pairs_of_head(geometry, offset, problem.is_causal);
      }
    }
    counts.push_back(count * repeats);
  }
  return counts;
}

std::vector<std::int32_t> attention_pattern(const Problem& problem, std::int64_t head) {
  validate(problem);
  if (!problem.cu_seqlens.empty() || problem.seqlen > 4096) {
    raise<InvalidProblem>(
        {"attention_pattern", "seqlen", "<= 4096, not packed",
         problem.cu_seqlens.empty() ? fmt::format("{}", problem.seqlen) : "cu_seqlens",
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
