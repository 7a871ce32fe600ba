// How many pairs a problem attends to, in closed form.
#include <algorithm>
#include <map>

#include <fmt/format.h>

#include "dilated/error.h"
#include "dilated/problem.h"

#include "src/geometry.h"
#include "src/sequences.h"

namespace dilated {
namespace {

/// A sum that knows when 64 bits do not hold it: the integer wraps, the double does not.
struct Count {
  std::uint64_t exact = 0;
  double rounded = 0.0;

  void add(std::int64_t times, std::int64_t a, std::int64_t b) {
    exact += static_cast<std::uint64_t>(times) * static_cast<std::uint64_t>(a) *
             static_cast<std::uint64_t>(b);
    rounded += static_cast<double>(times) * static_cast<double>(a) * static_cast<double>(b);
  }
  /// times * (1 + 2 + ... + n)
  void add_triangle(std::int64_t times, std::int64_t n) {
    n % 2 == 0 ? add(times, n / 2, n + 1) : add(times, n, (n + 1) / 2);
  }
};

/// `times` segments in which queries [q.first, q.last) meet keys [k.first, k.last) of one class.
void add_segment(Count& count, std::int64_t times, const RowSpan& q, const RowSpan& k,
                 bool is_causal) {
  if (q.empty() || k.empty()) {
    return;
  }
  if (!is_causal) {
    count.add(times, q.last - q.first, k.last - k.first);
    return;
  }
  // Queries before k.first see nothing, query i < k.last sees i + 1 - k.first keys, later ones all.
  const std::int64_t first = std::clamp(q.first, k.first, k.last);
  const std::int64_t last = std::clamp(q.last, k.first, k.last);
  count.add_triangle(times, last - k.first);
  count.add_triangle(-times, first - k.first);
  count.add(times, q.last - std::clamp(k.last, q.first, q.last), k.last - k.first);
}

/// Pairs of one head in one branch on one sequence. Segments that lie wholly in both windows are
/// alike; the others hold an end of a window or of the sequence.
void add_head(Count& count, std::int64_t heads, const BranchGeometry& geometry, std::int64_t offset,
              const Sequence& sequence, bool is_causal) {
  const auto segment = [&](std::int64_t times, std::int64_t s) {
    add_segment(count, times, geometry.span(s, offset, sequence.queries, 0),
                geometry.span(s, offset, sequence.keys, 0), is_causal);
  };
  const Range both = {std::max(sequence.queries.begin, sequence.keys.begin),
                      std::min(sequence.queries.end, sequence.keys.end)};
  const std::int64_t first_whole = ceil_div(both.begin, geometry.segment);
  const std::int64_t end_whole = std::max(both.end / geometry.segment, first_whole);
  if (first_whole < end_whole) {
    segment(heads * (end_whole - first_whole), first_whole);
  }
  const std::int64_t begin = both.begin / geometry.segment;
  const std::int64_t end = both.end > 0 ? ceil_div(both.end, geometry.segment) : 0;
  for (std::int64_t s = begin; s < std::min(first_whole, end); ++s) {
    segment(heads, s);
  }
  for (std::int64_t s = end_whole; s < end; ++s) {
    segment(heads, s);
  }
}

}  // namespace

std::vector<std::int64_t> count_pairs(const Problem& problem) {
  validate(problem);
  const std::vector<Sequence> sequences = sequences_of(problem);
  std::vector<std::int64_t> counts;
  for (std::size_t b = 0; b < problem.branches.size(); ++b) {
    const Branch& branch = problem.branches[b];
    std::map<std::int64_t, std::int64_t> heads_of_offset;
    for (const std::int64_t offset : branch.offsets) {
      ++heads_of_offset[offset];
    }
    heads_of_offset.erase(-1);
    Count count;
    for (Sequence sequence : sequences) {
      if (problem.key_layout == KeyLayout::kClassRows) {  // of all shards
        sequence.keys = {0, sequence.length};
      }
      if (sequence.length > 0) {
        const BranchGeometry geometry(sequence.length, branch.segment, branch.dilation);
        for (const auto& [offset, heads] : heads_of_offset) {
          add_head(count, heads, geometry, offset, sequence, problem.is_causal);
        }
      }
    }
    if (count.rounded >= 0x1p63) {
      reject(fmt::format("segments[{}]", b), "fewer than 2^63 query-key pairs",
             fmt::format("{:.3g}", count.rounded), "no machine computes this branch");
    }
    counts.push_back(static_cast<std::int64_t>(count.exact));
  }
  return counts;
}

}  // namespace dilated
