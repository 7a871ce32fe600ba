// One call as kernels see it: the tables in the workspace, and the numbers of the problem.
#pragma once

#include <cstdint>

#include <cuda_runtime_api.h>

#include "dilated/attention.h"
#include "dilated/plan.h"

#include "src/kernels/cuda/decision.h"
#include "src/score_units.h"

namespace dilated::gpu {

struct Call {
  const Sequence* sequences;
  const BranchShape* branches;
  const std::int64_t* offsets;
  const TileGroup* query_groups;
  const TileGroup* forward_groups;  // like query_groups, in tiles of the Hopper forward
  const TileGroup* key_groups;
  const TileGroup* backward_query_groups;  // like query_groups and key_groups, in tiles of the
  const TileGroup* backward_key_groups;    // Hopper backward
  const TileGroup* row_groups;
  int num_sequences;
  int num_branches;
  int num_heads;
  int heads_per_kv_head;
  int head_dim;
  std::int64_t branch_rows;
  std::int64_t head_offset;
  std::int64_t all_heads;
  double dropout_p;
  ScoreUnits units;
  float scale;
  float out_scale;
  Merge merge;
  bool is_causal;
  bool has_phantoms;
  bool needs_branch_outputs;
  bool copies_16_bytes;  // rows of the inputs are whole, aligned pieces of 16 bytes
  Masks masks;
};

/// Sends the plan's tables to the workspace and returns the call. What is sent travels as arguments
/// of launches: no copy from memory that would have to stay, and a CUDA graph records it.
Call begin_call(const Plan& plan, const Masks& masks, const Context& context);

/// Throws std::runtime_error with what CUDA says.
void check(cudaError_t error, const char* what);

/// Makes the problem's device current while it lives.
class DeviceGuard {
 public:
  explicit DeviceGuard(std::int64_t index);
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  ~DeviceGuard();

 private:
  int previous_ = 0;
  int current_ = 0;
};

void attention_forward(const Plan& plan, const ForwardTensors& tensors, const Context& context);
void attention_backward(const Plan& plan, const BackwardTensors& tensors, const Context& context);

}  // namespace dilated::gpu
