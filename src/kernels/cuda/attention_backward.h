// What the backward kernels of all architectures get.
#pragma once

#include <cstdint>

#include "src/kernels/cuda/call.h"

namespace dilated::gpu {

/// Of one row in one branch; base is +inf in rows that contribute nothing.
struct alignas(16) RowNumbers {
  float base;
  float residual;
  float delta;
  float unused;
};

struct BackwardArguments {
  Call call;
  ConstTensorView dout;
  ConstTensorView query;
  ConstTensorView key;
  ConstTensorView value;
  RowNumbers* row_numbers;  // (batch, heads, branch_rows)
  TensorView dquery;        // float32 sums, or results that the dense branch writes
  TensorView dkey;
  TensorView dvalue;
  // The branch of this launch.
  const TileGroup* groups;
  std::int64_t first_tile;
};

}  // namespace dilated::gpu
