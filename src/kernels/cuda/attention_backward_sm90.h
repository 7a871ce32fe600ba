// Backward on Hopper (compute capability 9.0), in place of the sm_80 kernels: host side.
#pragma once

#include "src/kernels/cuda/attention_backward.h"

namespace dilated::gpu::sm90 {

/// Query rows that pass by at once for dK and dV; both sums stay in registers.
constexpr int key_gradient_queries(int head_dim) { return head_dim <= 64 ? 128 : 64; }

/// Memory for what sparse branches give to a dense one: see Gradient::parts.
struct GradientParts {
  float* dquery = nullptr;
  float* dkey = nullptr;
  float* dvalue = nullptr;
};

/// Adds the gradients of all branches to the float32 sums, longest segments first; or, with memory
/// for parts, writes results.
void branches_backward(const gpu::BackwardArguments& arguments, const GradientParts& parts,
                       const Plan& plan, int* tickets, cudaStream_t stream);

}  // namespace dilated::gpu::sm90
