// Both questions are one: do integers x_t in given ranges bring sum_t c_t x_t into an interval?
// Terms are tried from the largest coefficient on; as strides nest in practice, only a few values
// of each are feasible.
#include "src/overlap.h"

#include <algorithm>
#include <cstdlib>

namespace dilated {
namespace {

struct Term {
  std::int64_t coefficient = 0;  // > 0
  std::int64_t low = 0;          // low <= x <= high
  std::int64_t high = 0;
};

std::int64_t floor_div(std::int64_t a, std::int64_t b) { return a / b - (a % b < 0 ? 1 : 0); }

class Search {
 public:
  /// Adds x in [low, high] with any coefficient.
  void add(std::int64_t coefficient, std::int64_t low, std::int64_t high) {
    if (coefficient < 0) {
      terms_[count_++] = {-coefficient, -high, -low};
    } else if (coefficient > 0 && (low != 0 || high != 0)) {
      terms_[count_++] = {coefficient, low, high};
    }
  }

  /// Is there a solution in [low, high]; with `nontrivial`, another than all zeros?
  bool run(std::int64_t low, std::int64_t high, bool nontrivial) {
    std::sort(terms_.begin(), terms_.begin() + static_cast<std::ptrdiff_t>(count_),
              [](const Term& a, const Term& b) { return a.coefficient > b.coefficient; });
    for (std::size_t t = count_; t-- > 0;) {
      least_[t] = least_[t + 1] + terms_[t].coefficient * terms_[t].low;
      most_[t] = most_[t + 1] + terms_[t].coefficient * terms_[t].high;
    }
    return find(0, low, high, nontrivial);
  }

 private:
  bool find(std::size_t t, std::int64_t low, std::int64_t high, bool nontrivial) {
    if (t == count_) {
      return low <= 0 && 0 <= high && !nontrivial;
    }
    const Term& term = terms_[t];
    // low - most <= c x <= high - least, with the extremes of the later terms.
    const std::int64_t first = std::max(term.low, -floor_div(most_[t + 1] - low, term.coefficient));
    const std::int64_t last =
        std::min(term.high, floor_div(high - least_[t + 1], term.coefficient));
    for (std::int64_t x = first; x <= last && budget_ > 0; ++x, --budget_) {
      if (find(t + 1, low - term.coefficient * x, high - term.coefficient * x,
               nontrivial && x == 0)) {
        return true;
      }
    }
    return false;
  }

  std::array<Term, 8> terms_{};
  std::array<std::int64_t, 9> least_{};
  std::array<std::int64_t, 9> most_{};
  std::size_t count_ = 0;
  int budget_ = 10000;  // exotic strides beyond it pass as disjoint
};

}  // namespace

bool overlaps_itself(const Footprint& view) {
  if (view.empty()) {
    return false;
  }
  Search search;
  for (std::size_t i = 0; i < view.shape.size(); ++i) {
    if (view.shape[i] > 1 && view.strides[i] == 0) {
      return true;
    }
    search.add(view.strides[i], 1 - view.shape[i], view.shape[i] - 1);
  }
  return search.run(1 - view.element, view.element - 1, true);
}

bool overlap(const Footprint& a, const Footprint& b) {
  if (a.empty() || b.empty()) {
    return false;
  }
  Search search;
  for (std::size_t i = 0; i < a.shape.size(); ++i) {
    search.add(a.strides[i], 0, a.shape[i] - 1);
    search.add(-b.strides[i], 0, b.shape[i] - 1);
  }
  // a + u and b + v share a byte if -b.element < ... : a + u < b + v + b.element, b + v < a + u +
  // a.element.
  const auto distance = static_cast<std::int64_t>(b.address - a.address);
  return search.run(distance - a.element + 1, distance + b.element - 1, false);
}

}  // namespace dilated
