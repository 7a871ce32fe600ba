// Which (sequence, head, part) a work item means.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "dilated/plan.h"

namespace dilated::cpu {

/// A work item: part `part` of head `head` of sequence `sequence`.
struct Item {
  std::size_t sequence = 0;
  std::int64_t head = 0;
  std::int64_t part = 0;
};

/// Numbers all (sequence, head, part), where `parts(sequence)` is the number of parts of a
/// sequence.
template <typename Parts>
class ItemRange {
 public:
  ItemRange(const std::vector<Sequence>& sequences, std::int64_t heads, Parts parts)
      : sequences_(sequences), heads_(heads), parts_(parts) {}

  std::int64_t size() const {
    std::int64_t total = 0;
    for (const Sequence& sequence : sequences_) {
      total += count(sequence);
    }
    return total;
  }

  /// Calls `body(item)` for items [begin, end).
  template <typename Body>
  void visit(std::int64_t begin, std::int64_t end, const Body& body) const {
    std::int64_t first = 0;
    for (std::size_t s = 0; s < sequences_.size() && first < end; ++s) {
      const std::int64_t items = count(sequences_[s]);
      const std::int64_t parts = heads_ > 0 ? items / heads_ : 0;
      for (std::int64_t i = std::max(begin - first, std::int64_t{0});
           i < std::min(items, end - first); ++i) {
        body(Item{s, i / parts, i % parts});
      }
      first += items;
    }
  }

 private:
  std::int64_t count(const Sequence& sequence) const {
    return sequence.length > 0 ? heads_ * parts_(sequence) : 0;
  }

  const std::vector<Sequence>& sequences_;
  std::int64_t heads_;
  Parts parts_;
};

}  // namespace dilated::cpu
