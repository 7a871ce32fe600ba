// Consecutive positions of a sequence, or rows of a tensor.
#pragma once

#include <algorithm>
#include <cstdint>

namespace dilated {

/// [begin, end) with begin <= end.
struct Range {
  std::int64_t begin = 0;
  std::int64_t end = 0;

  constexpr std::int64_t size() const { return end - begin; }
  constexpr bool contains(std::int64_t position) const {
    return begin <= position && position < end;
  }
  /// What lies before `limit`; keeps `begin`, so that rows keep their numbers.
  constexpr Range below(std::int64_t limit) const {
    return {begin, std::max(begin, std::min(end, limit))};
  }

  constexpr bool operator==(const Range&) const = default;
};

}  // namespace dilated
