// Branch, segment and residue arithmetic: the only place where it is written (semantics §3).
//   covered(p):  o >= 0 and (p mod w_e) mod r == o
//   K(p)      =  { base + o + i r : 0 <= i < rows } cut by causality and masks
// Positions count from the start of one sequence of length n. Plain constexpr integers: host and
// device.
#pragma once

#include <algorithm>
#include <cstdint>

#include "dilated/range.h"

namespace dilated {

constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) {
  return a / b + (a % b != 0 ? 1 : 0);
}

/// Rows of one class that a tensor holds: row i of the class, first <= i < last, is row
/// origin + i * step of the tensor. (Also what a tensor map needs.)
struct RowSpan {
  std::int64_t origin;
  std::int64_t step;
  std::int64_t first;
  std::int64_t last;

  constexpr std::int64_t row(std::int64_t i) const { return origin + i * step; }
  constexpr bool empty() const { return first >= last; }
};

/// One branch on one sequence of length n > 0.
struct BranchGeometry {
  std::int64_t length;    // n
  std::int64_t segment;   // w_e = min(w, n)
  std::int64_t dilation;  // r

  constexpr BranchGeometry(std::int64_t n, std::int64_t w, std::int64_t r)
      : length(n), segment(std::min(w, n)), dilation(r) {}

  constexpr std::int64_t num_segments() const { return ceil_div(length, segment); }
  constexpr std::int64_t segment_begin(std::int64_t s) const { return s * segment; }
  constexpr std::int64_t segment_length(std::int64_t s) const {
    return std::min(segment, length - segment_begin(s));
  }
  /// Row slots of a full segment, whatever the residue: ceil(w_e / r).
  constexpr std::int64_t slots() const { return ceil_div(segment, dilation); }
  /// Rows m' of residue o in segment s.
  constexpr std::int64_t rows(std::int64_t s, std::int64_t o) const {
    const std::int64_t len = segment_length(s);
    return len > o ? ceil_div(len - o, dilation) : 0;
  }
  /// Number of phantom keys z of residue o in segment s (tail = phantom, not causal) that belong to
  /// a window of keys: to the one that holds the segment's last position.
  constexpr std::int64_t phantoms(std::int64_t s, std::int64_t o, Range keys) const {
    return keys.contains(segment_begin(s) + segment_length(s) - 1) ? slots() - rows(s, o) : 0;
  }
  /// Position of row i of residue o in segment s.
  constexpr std::int64_t position(std::int64_t s, std::int64_t o, std::int64_t i) const {
    return segment_begin(s) + o + i * dilation;
  }
  constexpr bool covers(std::int64_t p, std::int64_t o) const {
    return o >= 0 && (p % segment) % dilation == o;
  }
  /// Row number inside its segment of a covered position p.
  constexpr std::int64_t row_of(std::int64_t p) const { return (p % segment) / dilation; }
  /// First row i of residue o in segment s whose position is >= p.
  constexpr std::int64_t first_row_at(std::int64_t s, std::int64_t o, std::int64_t p) const {
    const std::int64_t t = p - segment_begin(s) - o;
    return t <= 0 ? 0 : std::min(ceil_div(t, dilation), rows(s, o));
  }
  /// The rows of residue o in segment s whose positions lie in `window`, in a tensor whose row
  /// `row` is position window.begin.
  constexpr RowSpan span(std::int64_t s, std::int64_t o, Range window, std::int64_t row) const {
    return {row + segment_begin(s) + o - window.begin, dilation, first_row_at(s, o, window.begin),
            first_row_at(s, o, window.end)};
  }
  /// Row i of segment s in a compact buffer of all rows of one residue, whichever it is.
  constexpr std::int64_t slot(std::int64_t s, std::int64_t i) const { return s * slots() + i; }
  /// First slot that a position >= p may use.
  constexpr std::int64_t first_slot(std::int64_t p) const {
    return slot(p / segment, p % segment / dilation);
  }
  /// Slots that the positions of `window` may use.
  constexpr std::int64_t compact_rows(Range window) const {
    return window.size() > 0 ? first_slot(window.end - 1) + 1 - first_slot(window.begin) : 0;
  }
};

}  // namespace dilated
