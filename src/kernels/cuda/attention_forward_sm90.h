// Forward on Hopper (compute capability 9.0), step 1 of attention_forward.cu: host side.
#pragma once

#include <cstdint>

#include "src/kernels/cuda/call.h"

namespace dilated::gpu::sm90 {

/// Whether this build holds the kernels of sm_90a.
bool has_kernels();

struct ForwardCall {
  Call call;
  const ForwardTensors* tensors;
  TensorView branch_out;  // (batch, heads, branch_rows, head_dim), float32
  float2* branch_sums;    // (batch, heads, branch_rows): max, sum
  int* tickets;           // two
};

/// Writes (O_b, max, sum) of all branches; if decision.merges_in_dense, of all but the first in
/// ascending order, which writes out, lse and its residual.
void branches_forward(const ForwardCall& call, const Plan& plan, cudaStream_t stream);

}  // namespace dilated::gpu::sm90
