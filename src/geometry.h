// Branch, segment and residue arithmetic: the only place where it is written (semantics §3).
//   covered(p):  o >= 0 and (p mod w_e) mod r == o
//   K(p)      =  { base + o + i r : 0 <= i < rows } cut by causality and masks
// Positions count from the start of one sequence of length n. Plain constexpr integers: host and
// device.
#pragma once

#include <algorithm>
#include <cstdint>

namespace dilated {

constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) {
  return a / b + (a % b != 0 ? 1 : 0);
}

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
  /// Number of phantom keys z of residue o in segment s (tail = phantom, not causal).
  constexpr std::int64_t phantoms(std::int64_t s, std::int64_t o) const {
    return slots() - rows(s, o);
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
  /// Rows that this branch stores for the whole sequence in a compact buffer (any residue).
  constexpr std::int64_t compact_rows() const {
    const std::int64_t last = num_segments() - 1;
    return last * slots() + ceil_div(segment_length(last), dilation);
  }
};

}  // namespace dilated
