// The operator: forward and backward of dilated attention (semantics §4 and §6).
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "dilated/parallel_for.h"
#include "dilated/plan.h"
#include "dilated/tensor_view.h"

namespace dilated {

/// Key masks and dropout state, shared by both passes. Undefined views mean "not given".
struct Masks {
  StridedView<const void, 2>
      key_mask;  // (batch, seqlen) of bytes, non-zero = key takes part; dtype ignored
  const std::int64_t* seqused = nullptr;  // one length per sequence; keys j >= length are masked
  std::uint64_t dropout_seed = 0;
  std::uint64_t dropout_offset = 0;
};

struct ForwardTensors {
  ConstTensorView query;  // (batch, seqlen, num_heads, head_dim)
  ConstTensorView key;    // (batch, seqlen, num_kv_heads, head_dim)
  ConstTensorView value;  // (batch, seqlen, num_kv_heads, head_dim)
  Masks masks;
  TensorView out;  // (batch, seqlen, num_heads, head_dim); every element is written exactly once
  RowView lse;     // (batch, num_heads, seqlen), float32 (float64 for float64 inputs)
  // Written if defined (and plan.needs_branch_outputs()): normalised output and log-sum-exp of
  // every branch.
  TensorView branch_out;  // (batch, num_heads, plan.branch_rows(), head_dim), dtype of lse
  RowView branch_lse;     // (batch, num_heads, plan.branch_rows()), dtype of lse
};

struct BackwardTensors {
  ConstTensorView dout;  // like out
  ConstRowView dlse;     // like lse; undefined = zero
  ConstTensorView query, key, value, out;
  ConstRowView lse;
  ConstTensorView branch_out;  // required if plan.needs_branch_outputs()
  ConstRowView branch_lse;
  Masks masks;
  TensorView dquery, dkey, dvalue;  // like query, key, value
};

/// Where a call runs: its threads, and scratch memory of plan.workspace_bytes(pass, threads),
/// 64-byte aligned, or empty to let the core allocate it for the call.
struct Context {
  const ParallelFor* parallel_for = nullptr;  // null: `default_parallel_for()`
  std::span<std::byte> workspace;
};

/// Computes out and lse. Throws InvalidProblem if a view does not fit the plan or the workspace is
/// too small; nothing is written then.
void forward(const Plan& plan, const ForwardTensors& tensors, const Context& context = {});

/// Computes dquery, dkey and dvalue from dout and, optionally, dlse. Throws like `forward`.
void backward(const Plan& plan, const BackwardTensors& tensors, const Context& context = {});

}  // namespace dilated
