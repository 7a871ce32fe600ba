// One tile of scores of the forward pass, keys x 64 query lanes: how products write it and its
// online softmax,
//   m' = max(m, max_k S),  P = 2^(f (S - m')),  l' = l 2^(f (m - m')) + sum_k P,
//   acc' = acc 2^(f (m - m')) + V^T P,  with f as in score_units.h.
// Every lane is on its own; nothing here depends on which rows share a tile.

#if defined(DILATED_KERNELS_CPU_SOFTMAX_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef DILATED_KERNELS_CPU_SOFTMAX_INL_H_
#undef DILATED_KERNELS_CPU_SOFTMAX_INL_H_
#else
#define DILATED_KERNELS_CPU_SOFTMAX_INL_H_
#endif

#include <cstddef>
#include <cstdint>
#include <limits>

#include "hwy/highway.h"

#include "src/kernels/cpu/exp-inl.h"
#include "src/kernels/cpu/gemm-inl.h"
#include "src/kernels/cpu/pack-inl.h"
#include "src/kernels/cpu/row_stream-inl.h"
#include "src/kernels/cpu/scratch.h"

HWY_BEFORE_NAMESPACE();
namespace dilated::HWY_NAMESPACE {

using cpu::kTileLanes;

inline constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

/// Scores (keys, 64), the maximum of each lane, and the factor of each lane's older sums.
struct ScoreTile {
  float* score;
  float* maximum;
  float* rescale;
};

/// Stores scores (keys x lanes) and keeps the running maximum of every lane.
struct StoreScores {
  float* score;
  float* maximum;
  RowStream* upcoming;

  template <std::size_t kRows, std::size_t kVectors>
  HWY_INLINE void operator()(const Block<kRows, kVectors>& block, std::size_t row,
                             std::size_t column) const {
    const FloatTag tag;
    upcoming->advance();
    for (std::size_t v = 0; v < kVectors; ++v) {
      const std::size_t lane = column + v * kVectorFloats;
      FloatVector top = hn::LoadU(tag, maximum + lane);
      for (std::size_t i = 0; i < kRows; ++i) {
        hn::StoreU(block.sum[i][v], tag, score + (row + i) * kTileLanes + lane);
        top = hn::Max(top, block.sum[i][v]);
      }
      hn::StoreU(top, tag, maximum + lane);
    }
  }
};

/// out = factor * out + sums, one factor per lane.
struct RescaleAndAdd {
  float* out;
  const float* factor;

  template <std::size_t kRows, std::size_t kVectors>
  HWY_INLINE void operator()(const Block<kRows, kVectors>& block, std::size_t row,
                             std::size_t column) const {
    const FloatTag tag;
    for (std::size_t v = 0; v < kVectors; ++v) {
      const std::size_t lane = column + v * kVectorFloats;
      const FloatVector factors = hn::LoadU(tag, factor + lane);
      for (std::size_t i = 0; i < kRows; ++i) {
        float* at = out + (row + i) * kTileLanes + lane;
        hn::StoreU(hn::MulAdd(hn::LoadU(tag, at), factors, block.sum[i][v]), tag, at);
      }
    }
  }
};

/// Causal mask of a tile on the diagonal: lane i, row `tile_first` + i of the class, sees keys up
/// to its own row.
HWY_INLINE void hide_later_keys(const ScoreTile& tile, const std::int64_t* key_row,
                                std::int64_t tile_first, std::size_t keys, std::size_t lanes) {
  const FloatTag tag;
  const FloatVector hidden = hn::Set(tag, kMinusInfinity);
  for (std::size_t lane = 0; lane < lanes; lane += kVectorFloats) {
    const FloatVector query = hn::Iota(tag, static_cast<float>(lane));
    FloatVector top = hidden;
    for (std::size_t k = 0; k < keys; ++k) {
      float* const at = tile.score + k * kTileLanes + lane;
      const FloatVector key = hn::Set(tag, static_cast<float>(key_row[k] - tile_first));
      const FloatVector score = hn::IfThenElse(hn::Le(key, query), hn::LoadU(tag, at), hidden);
      top = hn::Max(top, score);
      hn::StoreU(score, tag, at);
    }
    hn::StoreU(top, tag, tile.maximum + lane);
  }
}

template <std::size_t kVectors>
HWY_INLINE void softmax_lanes(const ScoreTile& tile, float factor, std::size_t lane,
                              std::size_t keys, float* HWY_RESTRICT row_max,
                              float* HWY_RESTRICT row_sum) {
  const FloatTag tag;
  const FloatVector factors = hn::Set(tag, factor);
  FloatVector base[kVectors];
  FloatVector sum[kVectors];
  for (std::size_t v = 0; v < kVectors; ++v) {
    const std::size_t at = v * kVectorFloats;
    const FloatVector old_max = hn::LoadU(tag, row_max + at);
    const FloatVector new_max = hn::Max(old_max, hn::LoadU(tag, tile.maximum + lane + at));
    // A row without keys so far has maximum -inf; 0 in its place keeps -inf - (-inf) out.
    base[v] = hn::IfThenElse(hn::Eq(new_max, hn::Set(tag, kMinusInfinity)), hn::Zero(tag), new_max);
    hn::StoreU(new_max, tag, row_max + at);
    const FloatVector rescale = exp2_of_nonpositive(hn::Mul(factors, hn::Sub(old_max, base[v])));
    hn::StoreU(rescale, tag, tile.rescale + lane + at);
    hn::StoreU(hn::Mul(hn::LoadU(tag, row_sum + at), rescale), tag, row_sum + at);
    sum[v] = hn::Zero(tag);
  }
  float* HWY_RESTRICT score = tile.score + lane;
  for (std::size_t k = 0; k < keys; ++k, score += kTileLanes) {
    for (std::size_t v = 0; v < kVectors; ++v) {
      float* const at = score + v * kVectorFloats;
      const FloatVector p =
          exp2_of_nonpositive(hn::Mul(factors, hn::Sub(hn::LoadU(tag, at), base[v])));
      sum[v] = hn::Add(sum[v], p);
      hn::StoreU(p, tag, at);
    }
  }
  for (std::size_t v = 0; v < kVectors; ++v) {
    float* const at = row_sum + v * kVectorFloats;
    hn::StoreU(hn::Add(hn::LoadU(tag, at), sum[v]), tag, at);
  }
}

/// Online softmax of one score tile: S becomes P, the row state moves to the new maximum.
HWY_INLINE void softmax(const ScoreTile& tile, float factor, std::size_t keys, std::size_t lanes,
                        float* row_max, float* row_sum) {
  constexpr std::size_t kWidth = kPanelVectors * kVectorFloats;
  std::size_t lane = 0;
  for (; lane + kWidth <= lanes; lane += kWidth) {
    softmax_lanes<kPanelVectors>(tile, factor, lane, keys, row_max + lane, row_sum + lane);
  }
  for (; lane < lanes; lane += kVectorFloats) {
    softmax_lanes<1>(tile, factor, lane, keys, row_max + lane, row_sum + lane);
  }
}

}  // namespace dilated::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif
