// Merging partial results of one attention, computed over disjoint sets of keys (semantics §5):
//   L = log sum_i e^(l_i)        O = sum_i e^(l_i - L) O_i        absent: l_i = -inf
#pragma once

#include <span>

#include "dilated/attention.h"
#include "dilated/tensor_view.h"

namespace dilated {

/// One partial result: out (batch, rows, heads, head_dim) of any dtype, and lse (batch, heads,
/// rows), float32 (float64 with a float64 out).
struct Partial {
  ConstTensorView out;
  ConstRowView lse;
};

/// Gradients of one partial result; `out` like its out, `lse` like its lse.
struct PartialGradient {
  TensorView out;
  RowView lse;
};

/// Writes the merged out, of any dtype, and lse. Rows that are absent everywhere get 0 and -inf.
/// Sums are float64, rounded once. Throws InvalidProblem for no parts, for shapes or dtypes that do
/// not agree and for outputs that overlap, and Unsupported on a device without a merge. `device`:
/// whose memory it is; context.stream is its stream.
void merge(std::span<const Partial> parts, const TensorView& out, const RowView& lse,
           const Context& context = {}, const DeviceSpec& device = {});

/// Gradients of the parts from dout (like the merged out) and dlse (undefined = zero). Throws like
/// `merge`.
void merge_backward(std::span<const Partial> parts, const ConstTensorView& dout,
                    const ConstRowView& dlse, std::span<const PartialGradient> gradients,
                    const Context& context = {}, const DeviceSpec& device = {});

}  // namespace dilated
