// Backward on the CPU (semantics §6), branch by branch. A work item is one (sequence, key/value
// head, segment): items of a branch touch disjoint rows of dq, dk and dv, so there are no atomics
// and the bits do not depend on the number of threads. Two numbers per row, lse_row and delta_row,
// make all merges one form (g = out_scale dO):
//   P = e^(s - lse_row)          dV_j += P g
//   dS = P (g.v_j - delta_row)   dQ += scale dS k   dK += scale dS q
//
//   exact      lse_row = L               delta_row = dO.O - dL
//   detached   lse_row = L               delta_row = g.O_b - dL
//   sum        lse_row = l_b             delta_row = g.O_b - w_b dL       w_b = exp(l_b - L)
//   mean       lse_row = l_b + log n_p   delta_row = g.O_b - n_p w_b dL
//
// Vectors run along the keys (S, P, dS, dK^T, dV^T), so queries and g enter by broadcast as they
// lie in memory. Scores are those of forward to the bit; with lse_row as score_units.h stores it, P
// is the probability that forward normalised. out_scale goes to V and, at the end, to dV, so that
// dO.V and dO.O are rounded alike: in a row of one key dS is 0.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "src/branches.h"
#include "src/class_rows.h"
#include "src/geometry.h"
#include "src/hand_out.h"
#include "src/kernels/cpu/addressing.h"
#include "src/kernels/cpu/attention.h"
#include "src/kernels/cpu/decision.h"
#include "src/kernels/cpu/scratch.h"
#include "src/kernels/cpu/work_items.h"
#include "src/masks.h"
#include "src/score_units.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "src/kernels/cpu/attention_backward.cpp"
#include "hwy/foreach_target.h"  // includes this file once per target
#include "hwy/highway.h"

#include "src/kernels/cpu/gemm-inl.h"
#include "src/kernels/cpu/gradient_sums-inl.h"
#include "src/kernels/cpu/pack-inl.h"
#include "src/kernels/cpu/row_stream-inl.h"
#include "src/kernels/cpu/score_gradient-inl.h"

HWY_BEFORE_NAMESPACE();
namespace dilated::HWY_NAMESPACE {
namespace {

using cpu::BackwardScratch;
using cpu::kBackwardRows;

constexpr float kInfinity = std::numeric_limits<float>::infinity();

/// One segment of one branch for one key/value head and all its query heads.
class BackwardSegment {
 public:
  /// `sequence` is cut to the used length, not empty, and `segment` one of its segments.
  BackwardSegment(const Plan& plan, const BackwardTensors& tensors, const GradientSums& gradients,
                  const BackwardScratch& scratch, std::size_t branch, const Sequence& sequence,
                  std::size_t sequence_index, std::int64_t kv_head, std::int64_t segment)
      : plan_(plan),
        problem_(plan.problem()),
        tensors_(tensors),
        gradients_(gradients),
        scratch_(scratch),
        units_(plan.scale()),
        out_scale_(static_cast<float>(problem_.out_scale)),
        branch_(branch),
        sequence_index_(sequence_index),
        sequence_(sequence),
        kv_head_(kv_head),
        segment_(segment),
        geometry_(sequence.length, problem_.branches[branch].segment,
                  problem_.branches[branch].dilation),
        head_dim_(static_cast<std::size_t>(problem_.head_dim)),
        padded_(static_cast<std::size_t>(cpu::padded_head_dim(problem_.head_dim))),
        keys_(tensors.masks, sequence_.batch) {}

  void run() {
    const std::int64_t group = problem_.heads_per_kv_head();
    const std::int64_t chunk =
        static_cast<const cpu::CpuDecision&>(plan_.decision()).backward_chunk;
    for (head_ = kv_head_ * group; head_ < (kv_head_ + 1) * group; ++head_) {
      offset_ = problem_.branches[branch_].offsets[static_cast<std::size_t>(head_)];
      if (offset_ < 0) {
        continue;
      }
      query_span_ = geometry_.span(segment_, offset_, sequence_.queries, sequence_.query_row);
      key_rows_ =
          key_rows(plan_, branch_, sequence_index_, sequence_, geometry_, segment_, offset_, head_);
      key_span_ = key_rows_.span;
      if (problem_.is_causal) {  // earlier queries see none of the keys
        query_span_.first = std::max(query_span_.first, key_span_.first);
      }
      for (std::int64_t first = query_span_.first; first < query_span_.last; first += chunk) {
        attend(first, std::min(first + chunk, query_span_.last));
      }
    }
  }

 private:
  std::int64_t position(std::int64_t row) const {
    return geometry_.position(segment_, offset_, row);
  }

  const ConstTensorView& keys() const {
    return key_rows_.are_class_rows ? tensors_.class_key : tensors_.key;
  }
  const ConstTensorView& values() const {
    return key_rows_.are_class_rows ? tensors_.class_value : tensors_.value;
  }
  const TensorView& dkeys() const {
    return key_rows_.are_class_rows ? tensors_.dclass_key : gradients_.dkey();
  }
  const TensorView& dvalues() const {
    return key_rows_.are_class_rows ? tensors_.dclass_value : gradients_.dvalue();
  }

  /// Query rows [first, last) against all keys of the segment.
  void attend(std::int64_t first, std::int64_t last) {
    pack_queries(first, last, 0);
    std::fill_n(scratch_.dquery, static_cast<std::size_t>(last - first) * padded_, 0.0f);
    const std::int64_t end = problem_.is_causal ? std::min(key_span_.last, last) : key_span_.last;
    constexpr std::int64_t kBlocksPerTile =
        kBackwardRows / static_cast<std::int64_t>(block_rows(kPanelVectors));
    for (std::int64_t k = key_span_.first; k < end; k += kTileLanes) {
      const std::int64_t packed = pack_keys(k, std::min(k + kTileLanes, end));
      if (packed == 0) {
        continue;
      }
      const std::int64_t next = std::min(k + kTileLanes, end);
      const std::int64_t after_next = std::min(next + kTileLanes, end);
      upcoming_.clear();
      expect(dkeys(), k, next);
      expect(dvalues(), k, next);
      expect(keys(), next, after_next);
      expect(values(), next, after_next);
      upcoming_.spread(kBlocksPerTile * ceil_div(last - first, kBackwardRows));
      for (std::int64_t i = first; i < last; i += kBackwardRows) {
        const std::int64_t tile_last = std::min(i + kBackwardRows, last);
        if (!problem_.is_causal || scratch_.key_row[0] < tile_last) {
          const bool diagonal = problem_.is_causal && scratch_.key_row[packed - 1] > i;
          update(i, i - first, tile_last - i, packed, diagonal);
        }
      }
      add_key_gradients(packed);
    }
    const auto scale = static_cast<float>(plan_.scale());
    for (std::int64_t i = first; i < last; ++i) {
      add_row(scratch_.dquery + static_cast<std::size_t>(i - first) * padded_, scale, head_dim_,
              gradient_row(gradients_.dquery(), query_span_.row(i), head_));
    }
  }

  float* gradient_row(const TensorView& view, std::int64_t at, std::int64_t head) const {
    return reinterpret_cast<float*>(cpu::row_at(view, sequence_.batch, at, head));
  }

  /// Queries, dO and the numbers of rows [first, last), from `slot` on.
  void pack_queries(std::int64_t first, std::int64_t last, std::int64_t slot) {
    for (std::int64_t row = first; row < last; row += kTileLanes, slot += kTileLanes) {
      const std::int64_t count = std::min(kTileLanes, last - row);
      for (std::int64_t i = 0; i < count; ++i) {
        pack_query(row + i, slot + i, scratch_.rows + static_cast<std::size_t>(i) * padded_);
      }
      float dots[kTileLanes];
      dot_rows(dout_row(slot), head_dim_, scratch_.rows, padded_, static_cast<std::size_t>(count),
               head_dim_, dots);
      for (std::int64_t i = 0; i < count; ++i) {
        float& delta = scratch_.row_delta[slot + i];
        delta = scratch_.row_base[slot + i] == kInfinity ? 0.0f : delta + dots[i];
      }
    }
  }

  /// One row. `out` receives what dO is multiplied with in delta, row_delta the rest of it.
  void pack_query(std::int64_t row, std::int64_t slot, float* out) {
    const std::int64_t token = query_span_.row(row);
    load_row(problem_.dtype, cpu::row_at(tensors_.query, sequence_.batch, token, head_), head_dim_,
             units_.sign(), query_row(slot), head_dim_);
    load_row(tensors_.dout.dtype, cpu::row_at(tensors_.dout, sequence_.batch, token, head_),
             head_dim_, 1.0f, dout_row(slot), head_dim_);
    const float dlse =
        tensors_.dlse.defined() ? cpu::item_at(tensors_.dlse, sequence_.batch, head_, token) : 0.0f;
    LogSum sum{cpu::item_at(tensors_.lse, sequence_.batch, head_, token),
               tensors_.lse_residual.defined()
                   ? cpu::item_at(tensors_.lse_residual, sequence_.batch, head_, token)
                   : 0.0f};
    float delta = -dlse;
    if (plan_.needs_branch_outputs()) {
      const std::int64_t saved = plan_.branch_row_begin(branch_, sequence_index_) +
                                 geometry_.slot(segment_, row) -
                                 geometry_.first_slot(sequence_.queries.begin);
      const float* const branch_out =
          cpu::saved_row(tensors_.branch_out, sequence_.batch, head_, saved);
      std::transform(branch_out, branch_out + head_dim_, out,
                     [this](float x) { return out_scale_ * x; });
      if (problem_.merge != Merge::kLse) {
        const float* const pair =
            cpu::saved_row(tensors_.branch_lse, sequence_.batch, head_, saved);
        const LogSum branch{pair[0], pair[1]};
        const auto count = static_cast<float>(
            problem_.merge == Merge::kMean
                ? covering_branches(problem_, sequence_.length, head_, position(row))
                : 1);
        // A branch without keys: -inf - -inf must not appear, the row is dropped below.
        delta = branch.lse == -kInfinity ? 0.0f : delta * count * units_.share(branch, sum);
        sum = {branch.lse, branch.residual + std::log2(count)};
      }
    } else {
      load_row(tensors_.out.dtype, cpu::row_at(tensors_.out, sequence_.batch, token, head_),
               head_dim_, 1.0f, out, head_dim_);
    }
    const bool has_keys = sum.lse != -kInfinity;
    scratch_.row_base[slot] = has_keys ? units_.base_of(sum.lse) : kInfinity;
    scratch_.row_residual[slot] = has_keys ? sum.residual : 0.0f;
    scratch_.row_delta[slot] = delta;
  }

  /// Keys [first, last) that take part, as rows (K) and as columns (K, out_scale V); zeroes their
  /// gradient tiles.
  std::int64_t pack_keys(std::int64_t first, std::int64_t last) {
    std::size_t packed = 0;
    for (std::int64_t i = first; i < last; ++i) {
      const std::int64_t at = key_span_.row(i);
      if (!keys_(at)) {
        continue;
      }
      load_key(i, packed);
      load_row(problem_.dtype, cpu::row_at(values(), sequence_.batch, at, key_rows_.head),
               head_dim_, out_scale_, scratch_.rows + packed * padded_, padded_);
      scratch_.key_row[packed++] = i;
    }
    // Lanes beyond the last key are computed and never read, but must stay finite.
    std::fill(scratch_.key + packed * padded_, scratch_.key + kTileLanes * padded_, 0.0f);
    std::fill(scratch_.rows + packed * padded_, scratch_.rows + kTileLanes * padded_, 0.0f);
    transpose(scratch_.key, padded_, kTileLanes, head_dim_, scratch_.key_columns, kTileLanes);
    transpose(scratch_.rows, padded_, kTileLanes, head_dim_, scratch_.value_columns, kTileLanes);
    std::fill_n(scratch_.dkey_columns, head_dim_ * kTileLanes, 0.0f);
    std::fill_n(scratch_.dvalue_columns, head_dim_ * kTileLanes, 0.0f);
    return static_cast<std::int64_t>(packed);
  }

  /// Row `row` of the class as packed key `slot`.
  void load_key(std::int64_t row, std::size_t slot) const {
    load_row(problem_.dtype,
             cpu::row_at(keys(), sequence_.batch, key_span_.row(row), key_rows_.head), head_dim_,
             1.0f, key_row(slot), padded_);
  }

  /// Adds rows [first, last) of the keys to the rows to prefetch.
  template <typename View>
  void expect(const View& view, std::int64_t first, std::int64_t last) {
    if (first < last) {
      const std::int64_t size = size_of(view.dtype);
      upcoming_.add(cpu::row_at(view, sequence_.batch, key_span_.row(first), key_rows_.head),
                    key_span_.step * view.strides[1] * size, last - first,
                    head_dim_ * static_cast<std::size_t>(size));
    }
  }

  /// One tile of queries against the packed keys.
  void update(std::int64_t first, std::int64_t slot, std::int64_t count, std::int64_t packed,
              bool diagonal) {
    const auto rows = static_cast<std::size_t>(count);
    const auto keys = static_cast<std::size_t>(packed);
    const auto stride = static_cast<std::ptrdiff_t>(head_dim_);
    const float* const query = query_row(slot);
    const float* const dout = dout_row(slot);
    float* const probability = scratch_.probability;
    float* const dscore = scratch_.dscore;

    multiply(Broadcast{query, stride, 1}, rows, head_dim_, scratch_.key_columns, kTileLanes, keys,
             StoreAndPrefetch{{probability, kTileLanes}, &upcoming_});
    exponentiate(probability, units_.factor(), scratch_.row_base + slot,
                 scratch_.row_residual + slot, rows, keys);
    if (diagonal) {
      hide_later_keys(probability, scratch_.key_row, first, rows, keys);
    }
    const float* const delta = scratch_.row_delta + slot;
    const Broadcast dout_rows{dout, stride, 1};
    const bool apart = diagonal && !tile_is_finite(slot, rows, keys);
    if (problem_.dropout_p > 0.0 || apart) {
      multiply(dout_rows, rows, head_dim_, scratch_.value_columns, kTileLanes, keys,
               Store{dscore, kTileLanes});
      const Dropout dropout = dropout_of(problem_, tensors_.masks, sequence_index_, head_, branch_);
      score_gradient(dscore, probability, delta, rows, keys, [&](std::int64_t i, std::size_t k) {
        return problem_.dropout_p > 0.0
                   ? static_cast<float>(dropout(position(first + i), position(scratch_.key_row[k])))
                   : 1.0f;
      });
    } else {
      multiply(dout_rows, rows, head_dim_, scratch_.value_columns, kTileLanes, keys,
               StoreScoreGradient{dscore, probability, delta});
    }
    if (apart) {
      hide_later_keys(dscore, scratch_.key_row, first, rows, keys);
      add_seen_pairs(first, slot, rows, keys);
      return;
    }
    add_products(slot, rows, keys);
  }

  /// dV += P^T g, dK += dS^T q, dQ += dS K.
  void add_products(std::int64_t slot, std::size_t rows, std::size_t keys) {
    const auto stride = static_cast<std::ptrdiff_t>(head_dim_);
    const float* const query = query_row(slot);
    const float* const dout = dout_row(slot);
    float* const probability = scratch_.probability;
    float* const dscore = scratch_.dscore;
    multiply(Broadcast{dout, 1, stride}, head_dim_, rows, probability, kTileLanes, keys,
             Accumulate{scratch_.dvalue_columns, kTileLanes});
    multiply(Broadcast{query, 1, stride}, head_dim_, rows, dscore, kTileLanes, keys,
             Accumulate{scratch_.dkey_columns, kTileLanes});
    multiply(Broadcast{dscore, kTileLanes, 1}, rows, keys, scratch_.key, padded_, head_dim_,
             Accumulate{dquery_row(slot), padded_});
  }

  float* query_row(std::int64_t slot) const {
    return scratch_.query + static_cast<std::size_t>(slot) * head_dim_;
  }
  float* dout_row(std::int64_t slot) const {
    return scratch_.dout + static_cast<std::size_t>(slot) * head_dim_;
  }
  float* dquery_row(std::int64_t slot) const {
    return scratch_.dquery + static_cast<std::size_t>(slot) * padded_;
  }
  float* key_row(std::size_t key) const { return scratch_.key + key * padded_; }

  bool query_is_finite(std::int64_t slot) const {
    return is_finite(query_row(slot), head_dim_) && is_finite(dout_row(slot), head_dim_);
  }
  bool key_is_finite(std::size_t key) const { return is_finite(key_row(key), head_dim_); }

  /// Whether products over a tile on the diagonal may weigh hidden pairs by zero.
  bool tile_is_finite(std::int64_t slot, std::size_t rows, std::size_t keys) const {
    return is_finite(query_row(slot), rows * head_dim_) &&
           is_finite(dout_row(slot), rows * head_dim_) &&
           is_finite(scratch_.row_delta + slot, rows) && is_finite(scratch_.key, keys * padded_) &&
           is_finite(scratch_.value_columns, head_dim_ * kTileLanes);
  }

  /// The products of a tile on the diagonal that holds numbers that are not finite: these must
  /// reach what sees them, and 0 * NaN nothing else. Their rows leave the products and are added
  /// pair by pair.
  void add_seen_pairs(std::int64_t first, std::int64_t slot, std::size_t rows, std::size_t keys) {
    std::vector<std::size_t> bad_rows;
    std::vector<std::size_t> bad_keys;
    for (std::size_t i = 0; i < rows; ++i) {
      const std::int64_t at = slot + static_cast<std::int64_t>(i);
      if (!query_is_finite(at)) {
        bad_rows.push_back(i);
        std::fill_n(query_row(at), head_dim_, 0.0f);
        std::fill_n(dout_row(at), head_dim_, 0.0f);
      }
    }
    for (std::size_t k = 0; k < keys; ++k) {
      if (!key_is_finite(k)) {
        bad_keys.push_back(k);
        std::fill_n(key_row(k), head_dim_, 0.0f);
      }
    }
    add_products(slot, rows, keys);
    for (const std::size_t k : bad_keys) {
      load_key(scratch_.key_row[k], k);
    }
    for (const std::size_t i : bad_rows) {
      const std::int64_t row = first + static_cast<std::int64_t>(i);
      pack_queries(row, row + 1, slot + static_cast<std::int64_t>(i));
    }
    for (std::size_t k = 0; k < keys; ++k) {
      for (const std::size_t i : bad_rows) {
        if (scratch_.key_row[k] <= first + static_cast<std::int64_t>(i)) {
          const std::int64_t at = slot + static_cast<std::int64_t>(i);
          const float p = scratch_.probability[i * kTileLanes + k];
          const float ds = scratch_.dscore[i * kTileLanes + k];
          for (std::size_t c = 0; c < head_dim_; ++c) {
            scratch_.dvalue_columns[c * kTileLanes + k] += p * dout_row(at)[c];
            scratch_.dkey_columns[c * kTileLanes + k] += ds * query_row(at)[c];
          }
        }
      }
    }
    for (const std::size_t k : bad_keys) {
      for (std::size_t i = 0; i < rows; ++i) {
        if (scratch_.key_row[k] <= first + static_cast<std::int64_t>(i)) {
          add_row(key_row(k), scratch_.dscore[i * kTileLanes + k], head_dim_,
                  dquery_row(slot + static_cast<std::int64_t>(i)));
        }
      }
    }
  }

  void add_key_gradients(std::int64_t packed) const {
    const auto keys = static_cast<std::size_t>(packed);
    const float scale = units_.magnitude();  // packed queries have its sign
    transpose(scratch_.dkey_columns, kTileLanes, head_dim_, keys, scratch_.rows, padded_);
    for (std::size_t k = 0; k < keys; ++k) {
      add_row(scratch_.rows + k * padded_, scale, head_dim_,
              gradient_row(dkeys(), key_span_.row(scratch_.key_row[k]), key_rows_.head));
    }
    transpose(scratch_.dvalue_columns, kTileLanes, head_dim_, keys, scratch_.rows, padded_);
    for (std::size_t k = 0; k < keys; ++k) {
      add_row(scratch_.rows + k * padded_, out_scale_, head_dim_,
              gradient_row(dvalues(), key_span_.row(scratch_.key_row[k]), key_rows_.head));
    }
  }

  const Plan& plan_;
  const Problem& problem_;
  const BackwardTensors& tensors_;
  const GradientSums& gradients_;
  const BackwardScratch& scratch_;
  ScoreUnits units_;
  float out_scale_;
  std::size_t branch_;
  std::size_t sequence_index_;
  const Sequence& sequence_;
  std::int64_t kv_head_;
  std::int64_t head_ = 0;
  std::int64_t offset_ = 0;
  RowSpan query_span_{};
  KeyRows key_rows_{};
  RowSpan key_span_{};
  std::int64_t segment_;
  BranchGeometry geometry_;
  std::size_t head_dim_;
  std::size_t padded_;
  KeyFilter keys_;
  RowStream upcoming_;
};

}  // namespace

void backward_on_target(const Plan& plan, const BackwardTensors& tensors, const Context& context) {
  const Problem& problem = plan.problem();
  const ParallelFor& threads = *context.parallel_for;
  const auto& decision = static_cast<const cpu::CpuDecision&>(plan.decision());
  const GradientSums gradients(
      tensors, context.workspace.data() + decision.threads * decision.backward_scratch);
  gradients.clear(threads);

  // Longest segments first, the order of distributed runs, where their keys come from other ranks.
  for (auto branch = decision.branch_order.rbegin(); branch != decision.branch_order.rend();
       ++branch) {
    const std::int64_t segment = problem.branches[*branch].segment;
    // Segments that hold keys. A sequence that is cut keeps its segments or has only one.
    const auto first_segment = [segment](const Sequence& sequence) {
      return sequence.keys.begin / std::min(segment, sequence.length);
    };
    const cpu::ItemRange items(
        plan.sequences(), problem.num_kv_heads, [&](const Sequence& sequence) {
          return sequence.keys.size() == 0
                     ? 0
                     : ceil_div(sequence.keys.end, std::min(segment, sequence.length)) -
                           first_segment(sequence);
        });
    hand_out(threads, items.size(), [&](std::int64_t begin, std::int64_t end, int thread) {
      cpu::Carver carver(context.workspace.data() + thread * decision.backward_scratch);
      const BackwardScratch scratch(carver, decision.backward_chunk, problem.head_dim);
      items.visit(begin, end, [&](const cpu::Item& item) {
        const Sequence& whole = plan.sequences()[item.sequence];
        const Sequence sequence = used_sequence(plan, tensors.masks, item.sequence);
        const std::int64_t at = first_segment(whole) + item.part;
        if (sequence.keys.size() > 0 && at * std::min(segment, sequence.length) < sequence.length) {
          BackwardSegment(plan, tensors, gradients, scratch, *branch, sequence, item.sequence,
                          item.head, at)
              .run();
        }
      });
    });
  }

  gradients.round(threads);
}

}  // namespace dilated::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace dilated {
namespace {

HWY_EXPORT(backward_on_target);

}  // namespace

namespace cpu {

void attention_backward(const Plan& plan, const BackwardTensors& tensors, const Context& context) {
  HWY_DYNAMIC_DISPATCH(backward_on_target)(plan, tensors, context);
}

}  // namespace cpu
}  // namespace dilated
#endif
