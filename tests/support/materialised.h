// The oracle in C++, independent of the library's geometry: every score matrix is written out in
// memory.
//   S = scale Q K^T,  P = e^(S - l),  O_b = P V;  backward as tests/data/ref_dilated.py `backward`
// Run in float64 it is the oracle; run in another dtype, every stored matrix rounded to it and sums
// in float32, it is the "plain materialised implementation" of the tolerance rule (semantics §11).
#pragma once

#include <functional>

#include "tests/support/call.h"

namespace dilated::testing {

/// `inputs` in any dtype; results hold values of `dtype`, stored as float64.
Results materialised(const Problem& problem, const Inputs& inputs, DType dtype);

/// Empty if `got` keeps the tolerance rule: error against the reference at most twice that of the
/// plain implementation in the problem's dtype plus 1e-5, for each result; lse absolute 1e-3,
/// sixteen units in its last place, or twice the plain implementation's in float32. With `draws` >
/// 1 the error of the plain implementation is the largest over that many inputs of the same
/// problem: in a problem of a few rows, one input may be exact by luck (a gradient that is 0, an
/// output that happens to be representable). `redraw` gives the other inputs, by default
/// `other_inputs`.
using Redraw = std::function<Inputs(int draw)>;
std::string rule_violation(const Problem& problem, const Inputs& inputs, const Results& got,
                           int draws = 1, const Redraw& redraw = {});

/// Other values in the same shapes, with the same masks and lengths.
Inputs other_inputs(const Problem& problem, const Inputs& inputs, int draw);

/// The same inputs with their channels in another order: the same sums, rounded otherwise.
Inputs reordered(const Inputs& inputs, int draw);

}  // namespace dilated::testing
