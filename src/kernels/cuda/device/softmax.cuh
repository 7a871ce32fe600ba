// Softmax of one tile of scores in registers, in the accumulator layout of wgmma.cuh: every thread
// holds two rows, four neighbouring threads hold the columns of a row.
//   P = 2^(factor (s - max)),   sum = sum of P
#pragma once

#include <cstdint>
#include <type_traits>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "src/kernels/cuda/device/ptx.cuh"
#include "src/merge.h"

namespace dilated::gpu::sm90 {

/// Largest score of a row so far, and this thread's part of its sum.
struct RowSums {
  float max[2] = {kAbsentLse<float>, kAbsentLse<float>};
  float sum[2] = {0.0f, 0.0f};
};

__device__ inline float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, 2));
}
__device__ inline float quad_sum(float x) {
  x += __shfl_xor_sync(0xFFFFFFFFu, x, 1);
  return x + __shfl_xor_sync(0xFFFFFFFFu, x, 2);
}

/// Replaces scores by probabilities and returns by how much earlier sums of each row shrink.
/// `kMayBeEmpty`: all scores of a row so far may be -inf; its powers are then 0, not NaN.
template <bool kMayBeEmpty, int kCount>
__device__ inline float2 tile_softmax(float (&scores)[kCount], RowSums& rows, float factor) {
  float shrink[2];
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    float max = rows.max[row];
#pragma unroll
    for (int i = 2 * row; i < kCount; i += 4) {
      max = fmaxf(max, fmaxf(scores[i], scores[i + 1]));
    }
    max = quad_max(max);
    const float base = kMayBeEmpty && max == kAbsentLse<float> ? 0.0f : max;
    shrink[row] = exp2_unit(factor * (rows.max[row] - base));
    rows.max[row] = max;
    float sum = 0.0f;
#pragma unroll
    for (int i = 2 * row; i < kCount; i += 4) {
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        scores[i + k] = exp2_unit(factor * (scores[i + k] - base));
        sum += scores[i + k];
      }
    }
    rows.sum[row] = fmaf(rows.sum[row], shrink[row], sum);
  }
  return {shrink[0], shrink[1]};
}

template <typename Element>
__device__ inline std::uint32_t pack(float low, float high) {
  if constexpr (std::is_same_v<Element, __nv_bfloat16>) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const std::uint32_t&>(pair);
  } else {
    const __half2 pair = __floats2half2_rn(low, high);
    return reinterpret_cast<const std::uint32_t&>(pair);
  }
}

/// Scores of the accumulator layout as first operands of products: 16 columns per operand.
template <typename Element, int kCount>
__device__ inline void pack_operands(const float (&scores)[kCount],
                                     std::uint32_t (&operands)[kCount / 8][4]) {
#pragma unroll
  for (int k = 0; k < kCount / 8; ++k) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      operands[k][i] = pack<Element>(scores[8 * k + 2 * i], scores[8 * k + 2 * i + 1]);
    }
  }
}

}  // namespace dilated::gpu::sm90
