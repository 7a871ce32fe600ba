// Units of scores and of a row's sum of powers. Products q.k are kept as they come, without the
// factor scale, so that forward and backward compute the same bits and large scores are rounded
// once; a row holds the largest of them and the sum of 2^(factor (q.k - max)).
//
// Stored are a natural log-sum-exp in float32, which users see, and a residual in base 2, so that
// backward finds the exponent that forward normalised by:
//   base = round(lse / |scale|)     residual = factor (max - base) + log2(sum)
//   x    = factor (q.k - base) - residual
// max - base is exact where scores are large, so x is as exact as q.k itself; in a row of one key
// x is 0 at any finite score.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "src/merge.h"

namespace dilated {

struct LogSum {
  float lse;       // natural
  float residual;  // base 2
};

class ScoreUnits {
 public:
  constexpr explicit ScoreUnits(double scale)
      : magnitude_(std::abs(scale)), factor_(static_cast<float>(magnitude_ * 1.4426950408889634)) {
    // Below the smallest normal number a scale is 0: then queries are, and any factor will do.
    const bool is_zero = factor_ < std::numeric_limits<float>::min();
    sign_ = is_zero ? 0.0f : scale < 0.0 ? -1.0f : 1.0f;
    per_lse_ = is_zero ? 0.0f : static_cast<float>(1.0 / magnitude_);
    factor_ = is_zero ? 1.0f : factor_;
    magnitude_ = is_zero ? 0.0 : magnitude_;
  }

  /// Queries are packed times this: scores with a negative scale are those of -q.
  constexpr float sign() const { return sign_; }
  constexpr float factor() const { return factor_; }
  /// scale q = magnitude (sign q)
  constexpr float magnitude() const { return static_cast<float>(magnitude_); }
  /// 2^(factor x)
  constexpr float power(float x) const { return std::exp2(factor_ * x); }

  constexpr float base_of(float lse) const {
    // A product near the largest number may round beyond it.
    constexpr float kLargest = std::numeric_limits<float>::max();
    const float base = lse * per_lse_;
    return std::isinf(base) ? std::clamp(base, -kLargest, kLargest) : base;
  }
  constexpr LogSum log_sum(const ScaledSum<float>& row) const {
    if (row.max == kAbsentLse<float>) {
      return {kAbsentLse<float>, 0.0f};
    }
    const auto lse = static_cast<float>(magnitude_ * double{row.max} + std::log(double{row.sum}));
    return {lse, factor_ * (row.max - base_of(lse)) + std::log2(row.sum)};
  }
  /// Share of one branch in the whole, e^(l_b - L); neither is absent.
  constexpr float share(const LogSum& branch, const LogSum& whole) const {
    return std::exp2(factor_ * (base_of(branch.lse) - base_of(whole.lse)) +
                     (branch.residual - whole.residual));
  }

 private:
  double magnitude_;
  float factor_;
  float sign_;
  float per_lse_;
};

}  // namespace dilated
