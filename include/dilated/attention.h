// The operator: forward and backward of dilated attention (semantics §4 and §6).
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "dilated/parallel_for.h"
#include "dilated/plan.h"
#include "dilated/tensor_view.h"

namespace dilated {

/// Key masks, lengths and dropout state, shared by both passes; memory of the tensors' device.
/// Undefined views and null pointers mean "not given".
struct Masks {
  // (batch, key_rows) of bytes, non-zero = key takes part; dtype ignored
  StridedView<const void, 2> key_mask;
  // One length per sequence, 0 <= length <= that of the plan: the sequence has this length, rows at
  // or beyond it do not exist. Their out is 0, their lse -inf, their gradients 0.
  const std::int64_t* seqused = nullptr;
  const std::int64_t* dropout_state = nullptr;  // (seed, offset); required with dropout_p > 0
};

/// Results may be float32 whatever the inputs are: partial results are then not rounded. Outputs
/// may not overlap one another or the inputs.
struct ForwardTensors {
  ConstTensorView query;  // (batch, query_rows, num_heads, head_dim)
  ConstTensorView key;    // (batch, key_rows, num_kv_heads, head_dim)
  ConstTensorView value;  // (batch, key_rows, num_kv_heads, head_dim)
  Masks masks;
  TensorView out;  // like query, or float32; every element is written exactly once
  RowView lse;     // (batch, num_heads, query_rows), float32 (float64 for float64 inputs)
  // Written if defined, like lse: what a float32 lse cannot say of L, in the back end's units. With
  // it backward recomputes the very probabilities that forward normalised, however large scores
  // are.
  RowView lse_residual = {};
  // Written if defined, every row of them: normalised output and log-sum-exp of every branch, 0 and
  // -inf in rows that no position uses.
  TensorView branch_out = {};  // (batch, num_heads, plan.branch_rows(), head_dim), dtype of lse
  TensorView branch_lse = {};  // (batch, num_heads, plan.branch_rows(), 2): l_b and its residual
  // (batch, plan.class_row_count(), 1, head_dim), with KeyLayout::kClassRows only
  ConstTensorView class_key = {};
  ConstTensorView class_value = {};
};

struct BackwardTensors {
  ConstTensorView dout;  // like query, or float32
  ConstRowView dlse;     // like lse; undefined = zero
  ConstTensorView query, key, value;
  ConstTensorView class_key, class_value;  // with KeyLayout::kClassRows only
  ConstTensorView out;                     // as forward wrote it
  ConstRowView lse;
  // Undefined: probabilities are as exact as lse, off by up to 1e-7 |score|.
  ConstRowView lse_residual;
  ConstTensorView branch_out;  // required if plan.needs_branch_outputs()
  ConstTensorView branch_lse;
  Masks masks;
  TensorView dquery, dkey, dvalue;  // like query, key, value, or float32
  // Like class_key, float32 (float64 for float64 inputs): what this shard's queries give to the
  // keys of partial segments. dkey and dvalue are without them.
  TensorView dclass_key = {};
  TensorView dclass_value = {};
};

/// Where a call runs: its threads (CPU) or stream (CUDA), and scratch memory of
/// plan.workspace_bytes(pass) on the tensors' device, 64-byte aligned, or empty to let the core
/// allocate it for the call.
struct Context {
  const ParallelFor* parallel_for = nullptr;  // null: `default_parallel_for()`
  std::span<std::byte> workspace;
  void* stream = nullptr;  // cudaStream_t; null: the default stream
};

/// Computes out and lse. Throws InvalidProblem if a view does not fit the plan or the workspace is
/// too small; nothing is written then.
void forward(const Plan& plan, const ForwardTensors& tensors, const Context& context = {});

/// Computes dquery, dkey and dvalue from dout and, optionally, dlse. With windows, `out` and `lse`
/// are the window's own. Throws like `forward`, and Unsupported where a window lacks what detached
/// merge weights need.
void backward(const Plan& plan, const BackwardTensors& tensors, const Context& context = {});

}  // namespace dilated
