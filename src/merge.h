// (out, lse) (+) (out, lse): the only merge of partial attention results (semantics §5).
//   L = log(e^a + e^b),   out = e^(a-L) out_a + e^(b-L) out_b,   absent: lse = -inf, out = 0.
#pragma once

#include <cmath>
#include <limits>

namespace dilated {

template <typename Real>
inline constexpr Real kAbsentLse = -std::numeric_limits<Real>::infinity();

/// A sum of powers, base^max * sum; absent: max = -inf, sum = 0.
template <typename Real>
struct ScaledSum {
  Real max = kAbsentLse<Real>;
  Real sum = Real(0);
};

/// The sum of two, and the share of each in it. Differences of the maxima are exact where the sums
/// matter, however large the maxima are.
template <typename Real>
struct MergedSums {
  ScaledSum<Real> total;
  Real first;
  Real second;
};

/// `power(x)` is base^x. Absent operands get weight 0; two absent operands stay absent. 0.0 is a
/// value like any other.
template <typename Real, typename Power>
constexpr MergedSums<Real> merge_sums(const ScaledSum<Real>& a, const ScaledSum<Real>& b,
                                      const Power& power) {
  const Real top = a.max > b.max ? a.max : b.max;
  if (top == kAbsentLse<Real>) {
    return {{}, Real(0), Real(0)};
  }
  const Real first = a.sum * power(a.max - top);
  const Real second = b.sum * power(b.max - top);
  const Real sum = first + second;
  return {{top, sum}, first / sum, second / sum};
}

/// a, b: values of the two, in one rounding order for all kernels.
template <typename Real>
constexpr Real merged_value(const MergedSums<Real>& merged, Real a, Real b) {
  return std::fma(merged.second, b, merged.first * a);
}

/// Weights of two partial results and the log-sum-exp of both together.
template <typename Real>
struct MergeWeights {
  Real lse;
  Real first;
  Real second;
};

/// The same for log-sum-exps.
template <typename Real>
inline MergeWeights<Real> merge_weights(Real a, Real b) {
  const auto merged = merge_sums(ScaledSum<Real>{a, Real(1)}, ScaledSum<Real>{b, Real(1)},
                                 [](Real x) { return std::exp(x); });
  return {merged.total.max + std::log(merged.total.sum), merged.first, merged.second};
}

}  // namespace dilated
