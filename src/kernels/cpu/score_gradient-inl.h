// One tile of the backward pass, query rows x 64 key lanes: how products write scores and their
// gradients, probabilities, and the causal mask.

#if defined(DILATED_KERNELS_CPU_SCORE_GRADIENT_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef DILATED_KERNELS_CPU_SCORE_GRADIENT_INL_H_
#undef DILATED_KERNELS_CPU_SCORE_GRADIENT_INL_H_
#else
#define DILATED_KERNELS_CPU_SCORE_GRADIENT_INL_H_
#endif

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "hwy/highway.h"

#include "src/kernels/cpu/exp-inl.h"
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

/// S becomes P = 2^(f (S - base) - residual), at most 1 as lse_row is at least every score. Product
/// and difference are rounded one by one, as in the residual itself.
HWY_INLINE void exponentiate(float* tile, float factor, const float* row_base,
                             const float* row_residual, std::size_t rows, std::size_t keys) {
  const FloatTag tag;
  const FloatVector factors = hn::Set(tag, factor);
  for (std::size_t i = 0; i < rows; ++i) {
    float* const row = tile + i * kTileLanes;
    const FloatVector base = hn::Set(tag, row_base[i]);
    const FloatVector residual = hn::Set(tag, row_residual[i]);
    for (std::size_t k = 0; k < keys; k += kVectorFloats) {
      const FloatVector x = hn::Mul(factors, hn::Sub(hn::LoadU(tag, row + k), base));
      hn::StoreU(exp2_at_most_one(hn::Sub(x, residual)), tag, row + k);
    }
  }
}

/// Causal mask of a tile on the diagonal: 0 where the key is later than row `tile_first` + i of the
/// class.
HWY_INLINE void hide_later_keys(float* tile, const std::int64_t* key_row, std::int64_t tile_first,
                                std::size_t rows, std::size_t keys) {
  for (std::size_t i = 0; i < rows; ++i) {
    float* const row = tile + i * kTileLanes;
    const std::int64_t* const hidden =
        std::upper_bound(key_row, key_row + keys, tile_first + static_cast<std::int64_t>(i));
    std::fill(row + (hidden - key_row), row + keys, 0.0f);
  }
}

/// dS = P (keep (g.v) - delta_row), then P := keep P; `dscore` holds g.v on entry. keep(row, key)
/// is the factor of dropout, 1 without it.
template <typename Keep>
HWY_INLINE void score_gradient(float* dscore, float* probability, const float* delta,
                               std::size_t rows, std::size_t keys, const Keep& keep) {
  for (std::size_t i = 0; i < rows; ++i) {
    for (std::size_t k = 0; k < keys; ++k) {
      float& p = probability[i * kTileLanes + k];
      float& ds = dscore[i * kTileLanes + k];
      const float factor = keep(static_cast<std::int64_t>(i), k);
      ds = p * (factor * ds - delta[i]);
      p *= factor;
    }
  }
}

}  // namespace dilated::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif
