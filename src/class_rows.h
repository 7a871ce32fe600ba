// Which keys of a shard are class rows, and where the keys of one class lie.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "dilated/class_rows.h"
#include "dilated/plan.h"

#include "src/geometry.h"

namespace dilated {

/// The columns of a branch, in the order of the query heads, without its segments.
ClassRows class_columns(const Problem& problem, const Branch& branch);

/// Adds the partial segments of one sequence of `length` positions, of which the shard holds
/// `window`; `end` is the first free class row and moves on.
void add_partial_segments(const Branch& branch, bool is_causal, std::int64_t length, Range window,
                          std::size_t sequence, ClassRows& rows, std::int64_t& end);

/// Keys of one class: in the tensors of the shard's keys, or among the class rows.
struct KeyRows {
  bool are_class_rows;
  std::int64_t head;  // of the tensor
  RowSpan span;
  Range window;  // positions whose keys the tensor holds
};

/// `sequence` may be cut to its used length.
inline KeyRows key_rows(const Plan& plan, std::size_t branch, std::size_t sequence_index,
                        const Sequence& sequence, const BranchGeometry& geometry,
                        std::int64_t segment, std::int64_t offset, std::int64_t head) {
  const PartialSegment* const part = plan.partial_segment(branch, sequence_index, segment);
  if (part == nullptr) {
    return {false, head / plan.problem().heads_per_kv_head(),
            geometry.span(segment, offset, sequence.keys, sequence.key_row), sequence.keys};
  }
  const std::int64_t column =
      plan.class_rows()[branch].column_of_head[static_cast<std::size_t>(head)];
  return {true,
          0,
          {part->row + column * part->rows, 1, 0,
           geometry.first_row_at(segment, offset, part->positions.end)},
          {0, sequence.length}};
}

}  // namespace dilated
