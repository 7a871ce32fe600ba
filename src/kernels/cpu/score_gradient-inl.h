// How the products of the backward pass write a tile of scores and of their gradients, query rows x
// 64 key lanes.

#if defined(DILATED_KERNELS_CPU_SCORE_GRADIENT_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef DILATED_KERNELS_CPU_SCORE_GRADIENT_INL_H_
#undef DILATED_KERNELS_CPU_SCORE_GRADIENT_INL_H_
#else
#define DILATED_KERNELS_CPU_SCORE_GRADIENT_INL_H_
#endif

#include <cstddef>

#include "hwy/highway.h"

#include "src/kernels/cpu/gemm-inl.h"
#include "src/kernels/cpu/row_stream-inl.h"
#include "src/kernels/cpu/scratch.h"

HWY_BEFORE_NAMESPACE();
namespace dilated::HWY_NAMESPACE {

using cpu::kTileLanes;

/// Stores the sums and prefetches a few rows.
struct StoreAndPrefetch {
  Store store;
  RowStream* upcoming;

  template <std::size_t kRows, std::size_t kVectors>
  HWY_INLINE void operator()(const Block<kRows, kVectors>& block, std::size_t row,
                             std::size_t column) const {
    upcoming->advance();
    store(block, row, column);
  }
};

/// dS = P (sums - delta_row).
struct StoreScoreGradient {
  float* dscore;
  const float* probability;
  const float* delta;

  template <std::size_t kRows, std::size_t kVectors>
  HWY_INLINE void operator()(const Block<kRows, kVectors>& block, std::size_t row,
                             std::size_t column) const {
    const FloatTag tag;
    for (std::size_t i = 0; i < kRows; ++i) {
      const FloatVector deltas = hn::Set(tag, delta[row + i]);
      for (std::size_t v = 0; v < kVectors; ++v) {
        const std::size_t at = (row + i) * kTileLanes + column + v * kVectorFloats;
        const FloatVector p = hn::LoadU(tag, probability + at);
        hn::StoreU(hn::Mul(p, hn::Sub(block.sum[i][v], deltas)), tag, dscore + at);
      }
    }
  }
};

}  // namespace dilated::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif
