// Columns and partial segments of a branch.
#include "src/class_rows.h"

#include <algorithm>

namespace dilated {

ClassRows class_columns(const Problem& problem, const Branch& branch) {
  ClassRows rows;
  for (std::int64_t h = 0; h < problem.num_heads; ++h) {
    const ClassColumn column{h / problem.heads_per_kv_head(),
                             branch.offsets[static_cast<std::size_t>(h)]};
    if (column.offset < 0) {
      rows.column_of_head.push_back(-1);
      continue;
    }
    const auto found = std::find(rows.columns.begin(), rows.columns.end(), column);
    rows.column_of_head.push_back(found - rows.columns.begin());
    if (found == rows.columns.end()) {
      rows.columns.push_back(column);
    }
  }
  return rows;
}

void add_partial_segments(const Branch& branch, bool is_causal, std::int64_t length, Range window,
                          std::size_t sequence, ClassRows& rows, std::int64_t& end) {
  if (window.size() == 0) {
    return;
  }
  const BranchGeometry geometry(length, branch.segment, branch.dilation);
  const auto add = [&](std::int64_t segment) {
    const std::int64_t begin = geometry.segment_begin(segment);
    const std::int64_t last = begin + geometry.segment_length(segment);
    const Range seen{begin, is_causal ? std::min(last, window.end) : last};
    if (window.begin <= seen.begin && seen.end <= window.end) {
      return;
    }
    const std::int64_t count = ceil_div(seen.size(), branch.dilation);
    rows.segments.push_back({sequence, segment, seen, end, count});
    end += count * static_cast<std::int64_t>(rows.columns.size());
  };
  const std::int64_t first = window.begin / geometry.segment;
  const std::int64_t last = (window.end - 1) / geometry.segment;
  add(first);  // all between the two lie inside the window
  if (last > first) {
    add(last);
  }
}

}  // namespace dilated
