// Class rows: the keys of the segments that a shard of a sequence holds only in part, packed so
// that the rows of one class are neighbours (KeyLayout::kClassRows). Per branch, segment and
// column, in this order:
//   row i of a class  ->  row  segment.row + column * segment.rows + i  of `class_key`
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "dilated/range.h"

namespace dilated {

/// A key/value head and a residue that some of its query heads keep in a branch.
struct ClassColumn {
  std::int64_t kv_head = 0;
  std::int64_t offset = 0;

  bool operator==(const ClassColumn&) const = default;
};

/// A segment that a shard meets and does not hold as far as its queries see.
struct PartialSegment {
  std::size_t sequence = 0;  // 0 if not packed: all batch elements are alike
  std::int64_t segment = 0;
  Range positions;        // that the shard's queries see, from the segment's first on
  std::int64_t row = 0;   // of its first class row
  std::int64_t rows = 0;  // of every column, whatever its residue
};

/// Class rows of one branch.
struct ClassRows {
  std::vector<ClassColumn> columns;
  std::vector<std::int64_t> column_of_head;  // by query head, -1 where it does not run the branch
  std::vector<PartialSegment> segments;      // by sequence and segment
};

}  // namespace dilated
