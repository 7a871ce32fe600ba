// Forward on the CPU (semantics §4): one work item is a block of consecutive query rows of one
// head. Per branch, in ascending segment order, its rows of one class meet their keys in tiles,
// with vectors along the queries:
//   S = K Q^T,  P = 2^(f (S - max)),  acc = acc 2^(f (old max - max)) + V^T P,  f = scale log2(e),
// so that K and V enter by broadcast and need no transposition, the softmax needs no horizontal
// operation, and no head_dim wastes lanes. Then (O_b, l_b) is merged into the block's rows. Each
// row is computed in its own lane: its bits depend neither on the block, nor on its neighbours, nor
// on the number of threads.
#include <algorithm>
#include <cmath>

#include "src/branches.h"
#include "src/class_rows.h"
#include "src/geometry.h"
#include "src/hand_out.h"
#include "src/kernels/cpu/addressing.h"
#include "src/kernels/cpu/attention.h"
#include "src/kernels/cpu/branch_rows.h"
#include "src/kernels/cpu/decision.h"
#include "src/kernels/cpu/scratch.h"
#include "src/kernels/cpu/work_items.h"
#include "src/masks.h"
#include "src/merge.h"
#include "src/score_units.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "src/kernels/cpu/attention_forward.cpp"
#include "hwy/foreach_target.h"  // includes this file once per target
#include "hwy/highway.h"

#include "src/kernels/cpu/gemm-inl.h"
#include "src/kernels/cpu/pack-inl.h"
#include "src/kernels/cpu/softmax-inl.h"

HWY_BEFORE_NAMESPACE();
namespace dilated::HWY_NAMESPACE {
namespace {

using cpu::ForwardScratch;
using cpu::kForwardKeys;

/// At most forward_chunk query rows of one class, and the keys of that class.
struct Piece {
  std::size_t rank;  // in the order of branches
  std::size_t branch;
  BranchGeometry geometry;
  std::int64_t segment;
  std::int64_t offset;
  RowSpan queries;
  KeyRows rows;  // where the keys lie
  RowSpan keys;  // rows.span

  std::int64_t position(std::int64_t row) const { return geometry.position(segment, offset, row); }
};

/// Rows [first, first + rows) of a piece's class, at most 64: the `index`-th tile of the piece.
struct Tile {
  std::int64_t index;
  std::int64_t first;
  std::int64_t rows;
};

/// One block of rows of one head; members are what all its branches share.
class ForwardBlock {
 public:
  ForwardBlock(const Plan& plan, const ForwardTensors& tensors, const ForwardScratch& scratch,
               const cpu::Item& item)
      : plan_(plan),
        problem_(plan.problem()),
        decision_(static_cast<const cpu::CpuDecision&>(plan.decision())),
        tensors_(tensors),
        scratch_(scratch),
        units_(plan.scale()),
        sequence_index_(item.sequence),
        whole_(plan.sequences()[item.sequence]),
        sequence_(used_sequence(plan, tensors.masks, item.sequence)),
        head_(item.head),
        block_{whole_.queries.begin + item.part * decision_.forward_block,
               std::min(whole_.queries.begin + (item.part + 1) * decision_.forward_block,
                        whole_.queries.end)},
        used_(block_.below(sequence_.length)),
        head_dim_(static_cast<std::size_t>(problem_.head_dim)),
        padded_(static_cast<std::size_t>(cpu::padded_head_dim(problem_.head_dim))),
        keys_(tensors.masks, sequence_.batch) {}

  void run() {
    const auto rows = static_cast<std::size_t>(block_.size());
    std::fill_n(scratch_.state_out, rows * padded_, 0.0f);
    std::fill_n(scratch_.state_max, rows, kMinusInfinity);
    std::fill_n(scratch_.state_sum, rows, 0.0f);
    if (used_.size() > 0) {
      const std::size_t branches = decision_.branch_order.size();
      Piece piece = find_piece(0, 0, 0);
      while (piece.rank < branches) {
        const Piece next = find_piece(piece.rank, piece.segment, piece.queries.last);
        attend(piece, next.rank < branches ? &next : nullptr);
        piece = next;
      }
    }
    write_rows();
  }

 private:
  std::int64_t offset_of(std::size_t branch) const {
    return problem_.branches[branch].offsets[static_cast<std::size_t>(head_)];
  }
  BranchGeometry geometry_of(std::size_t branch) const {
    return {sequence_.length, problem_.branches[branch].segment,
            problem_.branches[branch].dilation};
  }
  std::int64_t num_tiles(const Piece& piece) const {
    return ceil_div(piece.queries.last - piece.queries.first, kTileLanes);
  }
  Tile tile_of(const Piece& piece, std::int64_t index) const {
    const std::int64_t first = piece.queries.first + index * kTileLanes;
    return {index, first, std::min(kTileLanes, piece.queries.last - first)};
  }
  /// Row of the query tensor, out and lse that holds position `p`.
  std::int64_t row_of(std::int64_t p) const {
    return sequence_.query_row + p - sequence_.queries.begin;
  }
  const ConstTensorView& keys_of(const Piece& piece) const {
    return piece.rows.are_class_rows ? tensors_.class_key : tensors_.key;
  }
  const ConstTensorView& values_of(const Piece& piece) const {
    return piece.rows.are_class_rows ? tensors_.class_value : tensors_.value;
  }
  float* query_tile(std::int64_t tile) const {
    return scratch_.query + tile * kTileLanes * problem_.head_dim;
  }
  float* sums_tile(std::int64_t tile) const {
    return scratch_.sums + tile * kTileLanes * problem_.head_dim;
  }

  /// First non-empty piece from row `row` of segment `segment` of branch order[rank] on; rank =
  /// number of branches if none is left.
  Piece find_piece(std::size_t rank, std::int64_t segment, std::int64_t row) const {
    const std::vector<std::size_t>& order = decision_.branch_order;
    for (; rank < order.size(); ++rank, segment = row = 0) {
      const std::size_t branch = order[rank];
      const std::int64_t offset = offset_of(branch);
      if (offset < 0) {
        continue;
      }
      const BranchGeometry geometry = geometry_of(branch);
      segment = std::max(segment, used_.begin / geometry.segment);
      for (; segment <= (used_.end - 1) / geometry.segment; ++segment, row = 0) {
        RowSpan queries = geometry.span(segment, offset, used_, row_of(used_.begin));
        queries.first = std::max(queries.first, row);
        if (!queries.empty()) {
          queries.last = std::min(queries.last, queries.first + decision_.forward_chunk);
          const KeyRows rows =
              key_rows(plan_, branch, sequence_index_, sequence_, geometry, segment, offset, head_);
          return {rank, branch, geometry, segment, offset, queries, rows, rows.span};
        }
      }
    }
    return {order.size(), 0, geometry_of(0), 0, 0, {}, {}, {}};
  }

  /// Adds rows [first, last) of a span to the rows to prefetch.
  void expect(const ConstTensorView& view, std::int64_t head, const RowSpan& span,
              std::int64_t first, std::int64_t last) {
    if (first < last) {
      const std::int64_t size = size_of(problem_.dtype);
      upcoming_.add(cpu::row_at(view, sequence_.batch, span.row(first), head),
                    span.step * view.strides[1] * size, last - first,
                    head_dim_ * static_cast<std::size_t>(size));
    }
  }

  /// End of the keys that some query of a piece sees.
  std::int64_t end_of_keys(const Piece& piece) const {
    return problem_.is_causal ? std::min(piece.keys.last, piece.queries.last) : piece.keys.last;
  }

  /// What is packed after the keys before `next_key`: the next keys, or the start of the next
  /// piece.
  void expect_after(const Piece& piece, std::int64_t next_key, const Piece* next_piece) {
    upcoming_.clear();
    if (next_key < end_of_keys(piece)) {
      const std::int64_t end = std::min(next_key + kForwardKeys, end_of_keys(piece));
      expect(keys_of(piece), piece.rows.head, piece.keys, next_key, end);
      expect(values_of(piece), piece.rows.head, piece.keys, next_key, end);
    } else if (next_piece != nullptr) {
      const RowSpan& queries = next_piece->queries;
      const RowSpan& keys = next_piece->keys;
      const std::int64_t end = std::min(keys.first + kForwardKeys, end_of_keys(*next_piece));
      expect(tensors_.query, head_, queries, queries.first, queries.last);
      expect(keys_of(*next_piece), next_piece->rows.head, keys, keys.first, end);
      expect(values_of(*next_piece), next_piece->rows.head, keys, keys.first, end);
    }
    constexpr std::int64_t kBlocksPerTile =
        kForwardKeys / static_cast<std::int64_t>(block_rows(kPanelVectors));
    upcoming_.spread(kBlocksPerTile * num_tiles(piece));
  }

  /// The queries of a piece against all keys of its class.
  void attend(const Piece& piece, const Piece* next_piece) {
    const std::int64_t tiles = num_tiles(piece);
    for (std::int64_t t = 0; t < tiles; ++t) {
      pack_queries(piece, tile_of(piece, t));
    }
    const std::int64_t end = end_of_keys(piece);
    for (std::int64_t k = piece.keys.first; k < end; k += kForwardKeys) {
      const std::int64_t packed = pack_keys(piece, k, std::min(k + kForwardKeys, end));
      if (packed == 0) {
        continue;
      }
      expect_after(piece, k + kForwardKeys, next_piece);
      for (std::int64_t t = 0; t < tiles; ++t) {
        const Tile tile = tile_of(piece, t);
        std::int64_t visible = packed;
        if (problem_.is_causal) {
          visible = std::upper_bound(scratch_.key_row, scratch_.key_row + packed,
                                     tile.first + tile.rows - 1) -
                    scratch_.key_row;
        }
        if (visible > 0) {
          update(piece, tile, visible);
        }
      }
    }
    for (std::int64_t t = 0; t < tiles; ++t) {
      finish(piece, tile_of(piece, t));
    }
  }

  /// Queries of one tile as columns, and the empty softmax state.
  void pack_queries(const Piece& piece, const Tile& tile) {
    for (std::int64_t i = 0; i < tile.rows; ++i) {
      load_row(
          problem_.dtype,
          cpu::row_at(tensors_.query, sequence_.batch, piece.queries.row(tile.first + i), head_),
          head_dim_, units_.sign(), scratch_.rows + static_cast<std::size_t>(i) * padded_, padded_);
    }
    // Lanes beyond the last row are computed and never read, but must stay finite.
    std::fill(scratch_.rows + static_cast<std::size_t>(tile.rows) * padded_,
              scratch_.rows + kTileLanes * padded_, 0.0f);
    transpose(scratch_.rows, padded_, kTileLanes, head_dim_, query_tile(tile.index), kTileLanes);
    std::fill_n(sums_tile(tile.index), head_dim_ * kTileLanes, 0.0f);
    std::fill_n(scratch_.row_max + tile.index * kTileLanes, kTileLanes, kMinusInfinity);
    std::fill_n(scratch_.row_sum + tile.index * kTileLanes, kTileLanes, 0.0f);
  }

  /// Keys [first, last) of a class that take part; masked ones are left out, not multiplied by
  /// zero.
  std::int64_t pack_keys(const Piece& piece, std::int64_t first, std::int64_t last) {
    const ConstTensorView& key = keys_of(piece);
    const ConstTensorView& value = values_of(piece);
    std::size_t packed = 0;
    for (std::int64_t i = first; i < last; ++i) {
      const std::int64_t at = piece.keys.row(i);
      if (!keys_(at)) {
        continue;
      }
      load_row(problem_.dtype, cpu::row_at(key, sequence_.batch, at, piece.rows.head), head_dim_,
               1.0f, scratch_.key + packed * head_dim_, head_dim_);
      load_row(problem_.dtype, cpu::row_at(value, sequence_.batch, at, piece.rows.head), head_dim_,
               1.0f, scratch_.value + packed * head_dim_, head_dim_);
      scratch_.key_row[packed++] = i;
    }
    return static_cast<std::int64_t>(packed);
  }

  /// One query tile against the first `visible` packed keys.
  void update(const Piece& piece, const Tile& tile, std::int64_t visible) {
    const auto keys = static_cast<std::size_t>(visible);
    const auto lanes = static_cast<std::size_t>(tile.rows);
    const auto stride = static_cast<std::ptrdiff_t>(head_dim_);
    float* const score = scratch_.score;
    const ScoreTile score_tile{score, scratch_.tile_max, scratch_.rescale};
    std::fill_n(scratch_.tile_max, kTileLanes, kMinusInfinity);
    multiply(Broadcast{scratch_.key, stride, 1}, keys, head_dim_, query_tile(tile.index),
             kTileLanes, lanes, StoreScores{score, scratch_.tile_max, &upcoming_});
    const bool diagonal = problem_.is_causal && scratch_.key_row[visible - 1] > tile.first;
    if (diagonal) {
      hide_later_keys(score_tile, scratch_.key_row, tile.first, keys, lanes);
    }
    softmax(score_tile, units_.factor(), keys, lanes, scratch_.row_max + tile.index * kTileLanes,
            scratch_.row_sum + tile.index * kTileLanes);
    if (problem_.dropout_p > 0.0) {
      const Dropout dropout =
          dropout_of(problem_, tensors_.masks, sequence_index_, head_, piece.branch);
      for (std::size_t k = 0; k < keys; ++k) {
        const std::int64_t key = piece.position(scratch_.key_row[k]);
        for (std::int64_t i = 0; i < tile.rows; ++i) {
          score[static_cast<std::int64_t>(k) * kTileLanes + i] *=
              static_cast<float>(dropout(piece.position(tile.first + i), key));
        }
      }
    }
    const auto add_values = [&] {
      multiply(Broadcast{scratch_.value, 1, stride}, head_dim_, keys, score, kTileLanes, lanes,
               RescaleAndAdd{sums_tile(tile.index), scratch_.rescale});
    };
    if (diagonal && !is_finite(scratch_.value, keys * head_dim_)) {
      add_seen_values(piece, tile, keys, add_values);
    } else {
      add_values();
    }
  }

  /// Values that are not finite must reach the queries that see them, and 0 * NaN no other: they
  /// leave the product and are added row by row.
  template <typename AddValues>
  void add_seen_values(const Piece& piece, const Tile& tile, std::size_t keys,
                       const AddValues& add_values) {
    const auto value = [&](std::size_t k) { return scratch_.value + k * head_dim_; };
    std::vector<std::size_t> apart;
    for (std::size_t k = 0; k < keys; ++k) {
      if (!is_finite(value(k), head_dim_)) {
        apart.push_back(k);
        std::fill_n(value(k), head_dim_, 0.0f);
      }
    }
    add_values();
    for (const std::size_t k : apart) {
      load_row(problem_.dtype,
               cpu::row_at(values_of(piece), sequence_.batch, piece.keys.row(scratch_.key_row[k]),
                           piece.rows.head),
               head_dim_, 1.0f, value(k), head_dim_);
      for (std::int64_t i = std::max<std::int64_t>(scratch_.key_row[k] - tile.first, 0);
           i < tile.rows; ++i) {
        const float p = scratch_.score[static_cast<std::int64_t>(k) * kTileLanes + i];
        for (std::size_t c = 0; c < head_dim_; ++c) {
          sums_tile(tile.index)[c * kTileLanes + static_cast<std::size_t>(i)] += p * value(k)[c];
        }
      }
    }
  }

  /// Adds phantom keys, normalises one tile and merges (O_b, l_b) into the block's rows.
  void finish(const Piece& piece, const Tile& tile) {
    const BranchGeometry& geometry = piece.geometry;
    const bool phantom = problem_.tail == Tail::kPhantom && !problem_.is_causal;
    const std::int64_t phantoms =
        phantom ? geometry.phantoms(piece.segment, piece.offset, piece.rows.window) : 0;
    const float* const row_max = scratch_.row_max + tile.index * kTileLanes;
    const float* const row_sum = scratch_.row_sum + tile.index * kTileLanes;
    transpose(sums_tile(tile.index), kTileLanes, head_dim_, static_cast<std::size_t>(tile.rows),
              scratch_.rows, padded_);
    for (std::int64_t i = 0; i < tile.rows; ++i) {
      ScaledSum<float> sum{row_max[i], row_sum[i]};
      float shrink = 1.0f;
      if (phantoms > 0) {  // keys of score 0
        const float top = std::max(sum.max, 0.0f);
        shrink = units_.power(sum.max - top);
        sum = {top, sum.sum * shrink + static_cast<float>(phantoms) * units_.power(-top)};
      }
      const float factor = sum.max == kMinusInfinity ? 0.0f : shrink / sum.sum;
      float* const row = scratch_.rows + static_cast<std::size_t>(i) * padded_;
      std::transform(row, row + head_dim_, row, [factor](float x) { return factor * x; });
      std::fill(row + head_dim_, row + padded_, 0.0f);
      merge(piece.position(tile.first + i) - block_.begin, row, sum);
      if (tensors_.branch_out.defined()) {
        const std::int64_t at = plan_.branch_row_begin(piece.branch, sequence_index_) +
                                geometry.slot(piece.segment, tile.first + i) -
                                geometry.first_slot(sequence_.queries.begin);
        std::copy_n(row, head_dim_,
                    cpu::saved_row(tensors_.branch_out, sequence_.batch, head_, at));
        const LogSum saved = units_.log_sum(sum);
        float* const pair = cpu::saved_row(tensors_.branch_lse, sequence_.batch, head_, at);
        pair[0] = saved.lse;
        pair[1] = saved.residual;
      }
    }
  }

  void merge(std::int64_t row, const float* branch_row, const ScaledSum<float>& branch_sum) {
    float* const out = scratch_.state_out + static_cast<std::size_t>(row) * padded_;
    const ScaledSum<float> state{scratch_.state_max[row], scratch_.state_sum[row]};
    const auto merged = merge_sums(state, branch_sum, [this](float x) { return units_.power(x); });
    scratch_.state_max[row] = merged.total.max;
    scratch_.state_sum[row] = merged.total.sum;
    if (problem_.merge == Merge::kLse) {
      blend_row(merged.first, merged.second, branch_row, padded_, out);
    } else {
      blend_row(1.0f, 1.0f, branch_row, padded_, out);
    }
  }

  void write_rows() {
    const auto out_scale = static_cast<float>(problem_.out_scale);
    for (std::int64_t p = block_.begin; p < block_.end; ++p) {
      float* const row = scratch_.state_out + static_cast<std::size_t>(p - block_.begin) * padded_;
      float factor = out_scale;
      if (problem_.merge == Merge::kMean && p < used_.end) {
        // A row that no branch covers is zero anyway.
        factor /= static_cast<float>(
            std::max(1, covering_branches(problem_, sequence_.length, head_, p)));
      }
      if (factor != 1.0f) {
        for (std::size_t c = 0; c < head_dim_; ++c) {
          row[c] *= factor;
        }
      }
      store_row(tensors_.out.dtype, row, head_dim_,
                cpu::row_at(tensors_.out, sequence_.batch, row_of(p), head_));
      const LogSum sum = units_.log_sum(
          {scratch_.state_max[p - block_.begin], scratch_.state_sum[p - block_.begin]});
      cpu::item_at(tensors_.lse, sequence_.batch, head_, row_of(p)) = sum.lse;
      if (tensors_.lse_residual.defined()) {
        cpu::item_at(tensors_.lse_residual, sequence_.batch, head_, row_of(p)) = sum.residual;
      }
    }
  }

  const Plan& plan_;
  const Problem& problem_;
  const cpu::CpuDecision& decision_;
  const ForwardTensors& tensors_;
  const ForwardScratch& scratch_;
  ScoreUnits units_;
  std::size_t sequence_index_;
  const Sequence& whole_;
  Sequence sequence_;  // as far as it is used
  std::int64_t head_;
  Range block_;  // positions of this work item
  Range used_;   // those of them that exist
  std::size_t head_dim_;
  std::size_t padded_;
  KeyFilter keys_;
  RowStream upcoming_;
};

}  // namespace

void forward_on_target(const Plan& plan, const ForwardTensors& tensors, const Context& context) {
  const Problem& problem = plan.problem();
  const auto& decision = static_cast<const cpu::CpuDecision&>(plan.decision());
  cpu::clear_unused_branch_rows(plan, tensors, *context.parallel_for);
  const cpu::ItemRange items(plan.sequences(), problem.num_heads, [&](const Sequence& sequence) {
    return ceil_div(sequence.queries.size(), decision.forward_block);
  });
  hand_out(*context.parallel_for, items.size(),
           [&](std::int64_t begin, std::int64_t end, int thread) {
             cpu::Carver carver(context.workspace.data() + thread * decision.forward_scratch);
             const ForwardScratch scratch(carver, decision.forward_block, decision.forward_chunk,
                                          problem.head_dim);
             items.visit(begin, end, [&](const cpu::Item& item) {
               ForwardBlock(plan, tensors, scratch, item).run();
             });
           });
}

std::string target_name() { return hwy::TargetName(HWY_TARGET); }

}  // namespace dilated::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace dilated {
namespace {

HWY_EXPORT(forward_on_target);
HWY_EXPORT(target_name);

}  // namespace

namespace cpu {

void attention_forward(const Plan& plan, const ForwardTensors& tensors, const Context& context) {
  HWY_DYNAMIC_DISPATCH(forward_on_target)(plan, tensors, context);
}

std::string simd_target() { return HWY_DYNAMIC_DISPATCH(target_name)(); }

}  // namespace cpu
}  // namespace dilated
#endif
