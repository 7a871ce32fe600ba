// Forward on Hopper (compute capability 9.0): host side of attention_forward_sm90.cuh.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include <cuda_runtime_api.h>

#include "dilated/problem.h"

namespace dilated::gpu {

/// One call, device pointers; strides in elements; (batch, rows, heads, head_dim).
struct ForwardCall {
  DType dtype = DType::kBFloat16;
  bool is_causal = false;
  float scale = 1.0f;
  std::int64_t batch = 1, length = 0, heads = 1, kv_heads = 1, head_dim = 0;
  struct View {
    void* data;
    std::int64_t batch_stride, row_stride, head_stride;
  };
  View query, key, value, out;
  float* lse = nullptr;  // (batch, heads, length)
  std::vector<Branch> branches;
  // Workspace: (batch, heads, partial_rows, head_dim) and (batch, heads, partial_rows, 2), and one
  // counter per launch.
  float* partial_out = nullptr;
  float* partial_sums = nullptr;
  int* tickets = nullptr;
  cudaStream_t stream = nullptr;
};

/// Rows of one head in the partial results of all branches but the dense one.
std::int64_t partial_rows(std::int64_t length, std::span<const Branch> branches);

/// Index of the branch in whose epilogue all others are merged: the first with dilation 1 that
/// every head runs. Throws std::invalid_argument if there is none.
std::size_t dense_branch(std::span<const Branch> branches);

void forward_sm90(const ForwardCall& call);

}  // namespace dilated::gpu
