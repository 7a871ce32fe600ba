// (out, lse) (+) (out, lse): the only merge of partial attention results (semantics §5).
//   L = log(e^a + e^b),   out = e^(a-L) out_a + e^(b-L) out_b,   absent: lse = -inf, out = 0.
#pragma once

#include <cmath>
#include <limits>

namespace dilated {

template <typename Real>
inline constexpr Real kAbsentLse = -std::numeric_limits<Real>::infinity();

/// Weights of two partial results and the log-sum-exp of both together.
template <typename Real>
struct MergeWeights {
  Real lse;
  Real first;
  Real second;
};

/// Absent operands (-inf) get weight 0; two absent operands stay absent. 0.0 is a value like any
/// other.
template <typename Real>
inline MergeWeights<Real> merge_weights(Real a, Real b) {
  const Real top = a > b ? a : b;
  if (top == kAbsentLse<Real>) {
    return {top, Real(0), Real(0)};
  }
  const Real ea = std::exp(a - top);
  const Real eb = std::exp(b - top);
  const Real sum = ea + eb;
  return {top + std::log(sum), ea / sum, eb / sum};
}

}  // namespace dilated
