// Rows of the caller's tensors: where row (sequence, position, head) lies, which keys take part,
// and which (sequence, head, part) a work item means. Shared by forward and backward; no SIMD here.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <vector>

#include "dilated/attention.h"

#include "src/dropout.h"
#include "src/geometry.h"

namespace dilated::cpu {

inline constexpr double kLog2E = 1.4426950408889634;

/// Address of a row of head_dim elements; `at` is the row in the tensor (sequence start +
/// position).
inline const std::byte* row_at(const ConstTensorView& view, std::int64_t batch, std::int64_t at,
                               std::int64_t head) {
  return static_cast<const std::byte*>(view.data) +
         (batch * view.strides[0] + at * view.strides[1] + head * view.strides[2]) *
             size_of(view.dtype);
}

inline std::byte* row_at(const TensorView& view, std::int64_t batch, std::int64_t at,
                         std::int64_t head) {
  return static_cast<std::byte*>(view.data) +
         (batch * view.strides[0] + at * view.strides[1] + head * view.strides[2]) *
             size_of(view.dtype);
}

/// Entry of a float32 (batch, heads, rows) view.
inline float& item_at(const RowView& view, std::int64_t batch, std::int64_t head,
                      std::int64_t row) {
  return static_cast<float*>(
      view.data)[batch * view.strides[0] + head * view.strides[1] + row * view.strides[2]];
}

inline float item_at(const ConstRowView& view, std::int64_t batch, std::int64_t head,
                     std::int64_t row) {
  return static_cast<const float*>(
      view.data)[batch * view.strides[0] + head * view.strides[1] + row * view.strides[2]];
}

/// Which keys of one sequence take part.
class KeyFilter {
 public:
  KeyFilter(const Masks& masks, const Sequence& sequence, std::size_t index)
      : used_(masks.seqused != nullptr ? masks.seqused[index] : sequence.length) {
    if (masks.key_mask.defined()) {
      stride_ = masks.key_mask.strides[1];
      mask_ = static_cast<const unsigned char*>(masks.key_mask.data) +
              sequence.batch * masks.key_mask.strides[0] + sequence.start * stride_;
    }
  }
  bool operator()(std::int64_t position) const {
    return position < used_ && (mask_ == nullptr || mask_[position * stride_] != 0);
  }

 private:
  std::int64_t used_;
  const unsigned char* mask_ = nullptr;
  std::int64_t stride_ = 0;
};

/// Draws of one (sequence, head, branch).
struct Dropout {
  std::uint64_t key = 0;
  std::uint64_t threshold = 0;
  float factor = 1.0f;  // 1 / (1 - p); irrelevant if nothing is kept

  Dropout(const Problem& problem, const Masks& masks, std::size_t sequence, std::int64_t head,
          std::size_t branch)
      : key(dropout_key(masks.dropout_seed, masks.dropout_offset,
                        (sequence * static_cast<std::uint64_t>(problem.num_heads) +
                         static_cast<std::uint64_t>(head)) *
                                problem.branches.size() +
                            branch)),
        threshold(dropout_threshold(problem.dropout_p)),
        factor(problem.dropout_p < 1.0 ? static_cast<float>(1.0 / (1.0 - problem.dropout_p))
                                       : 0.0f) {}

  float operator()(std::int64_t query, std::int64_t position) const {
    return dropout_draw(key, static_cast<std::uint64_t>(query),
                        static_cast<std::uint64_t>(position)) < threshold
               ? factor
               : 0.0f;
  }
};

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

/// A work item: part `part` of head `head` of sequence `sequence`.
struct Item {
  std::size_t sequence = 0;
  std::int64_t head = 0;
  std::int64_t part = 0;
};

/// Numbers all (sequence, head, part), where `parts(length)` is the number of parts of a sequence.
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
    return sequence.length > 0 ? heads_ * parts_(sequence.length) : 0;
  }

  const std::vector<Sequence>& sequences_;
  std::int64_t heads_;
  Parts parts_;
};

}  // namespace dilated::cpu
