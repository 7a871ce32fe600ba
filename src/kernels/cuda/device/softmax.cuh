// Softmax of one tile of scores in registers, in the accumulator layout of wgmma.cuh: every thread
// holds two rows, four neighbouring threads hold the columns of a row.
//   reference = factor max,   P = 2^(factor s - reference),   sum = sum of P
// One rounding per score: the reference enters a fused multiply-add, and whatever its own rounding
// is, it cancels in O and is part of the log-sum-exp.
#pragma once

#include <cstdint>
#include <type_traits>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "src/kernels/cuda/device/ptx.cuh"
#include "src/merge.h"

namespace dilated::gpu {

/// 2^x for x <= 0 on the units of multiply-adds: x = i + t, |t| <= 1/2, a polynomial for 2^t, i
/// added to the exponent. The largest relative error is 1e-4, below the rounding of P.
__device__ inline float exp2_polynomial(float x) {
  constexpr float kRound = 12582912.0f;  // 1.5 2^23: adding it rounds to an integer
  x = fmaxf(x, -126.0f);
  const float shifted = x + kRound;
  const float t = x - (shifted - kRound);
  float y = fmaf(t, 0.05550410866f, 0.2402265069f);
  y = fmaf(t, y, 0.6931471806f);
  y = fmaf(t, y, 1.0f);
  return __int_as_float(__float_as_int(y) + (__float_as_int(shifted) << 23));
}

/// Largest value of a row so far (without `factor`), and this thread's part of its sum.
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

/// factor max, and 0 for a row that has seen nothing: its powers are then 0, not NaN.
__device__ inline float reference_of(float max, float factor) {
  return max == kAbsentLse<float> ? 0.0f : max * factor;
}

/// Replaces scores by probabilities and returns by how much earlier sums of each row shrink.
/// `kMayBeEmpty`: all scores of a row may be -inf. `kPolynomial` of 8 powers avoid the unit of
/// special functions.
template <bool kMayBeEmpty, int kPolynomial, int kCount>
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
    const float reference = kMayBeEmpty ? reference_of(max, factor) : max * factor;
    shrink[row] = exp2_unit(rows.max[row] * factor - reference);
    rows.max[row] = max;
    float sum = 0.0f;
#pragma unroll
    for (int i = 2 * row; i < kCount; i += 4) {
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const float x = fmaf(scores[i + k], factor, -reference);
        const bool polynomial = (i / 4 * 2 + k) % 8 < kPolynomial;
        scores[i + k] = polynomial ? exp2_polynomial(x) : exp2_unit(x);
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

}  // namespace dilated::gpu
