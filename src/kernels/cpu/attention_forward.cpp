// Forward on the CPU (semantics §4): one work item is a block of consecutive query rows of one
// head. Per branch, in ascending segment order, its rows of one class meet their keys in tiles,
// with vectors along the queries:
//   S = K (scale log2(e) Q^T),  P = 2^(S - max),  acc = acc 2^(old max - max) + V^T P,
// so that K and V enter by broadcast and need no transposition, the softmax needs no horizontal
// operation, and no head_dim wastes lanes. Then (O_b, l_b) is merged into the block's rows. Each
// row is computed in its own lane: its bits depend neither on the block, nor on its neighbours, nor
// on the number of threads.
#include <algorithm>
#include <cmath>

#include "src/geometry.h"
#include "src/kernels/cpu/attention.h"
#include "src/kernels/cpu/rows.h"
#include "src/kernels/cpu/scratch.h"
#include "src/merge.h"

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
constexpr float kLn2 = 0.6931471805599453f;

/// One block of rows of one head; members are what all its branches share.
class ForwardBlock {
 public:
  ForwardBlock(const Plan& plan, const ForwardTensors& tensors, const ForwardScratch& scratch,
               std::int64_t block, const cpu::Item& item)
      : plan_(plan),
        problem_(plan.problem()),
        tensors_(tensors),
        scratch_(scratch),
        sequence_index_(item.sequence),
        sequence_(plan.sequences()[item.sequence]),
        head_(item.head),
        kv_head_(item.head / problem_.heads_per_kv_head()),
        begin_(item.part * block),
        end_(std::min(begin_ + block, sequence_.length)),
        head_dim_(static_cast<std::size_t>(problem_.head_dim)),
        padded_(static_cast<std::size_t>(cpu::padded_head_dim(problem_.head_dim))),
        keys_(tensors.masks, sequence_, item.sequence) {}

  void run(const std::vector<std::size_t>& order) {
    const auto rows = static_cast<std::size_t>(end_ - begin_);
    std::fill_n(scratch_.state_out, rows * padded_, 0.0f);
    std::fill_n(scratch_.state_lse, rows, kMinusInfinity);
    Piece piece = find_piece(order, 0, 0, 0);
    while (piece.rank < order.size()) {
      const Piece next = find_piece(order, piece.rank, piece.segment, piece.last);
      attend(piece, next.rank < order.size() ? &next : nullptr);
      piece = next;
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
  std::int64_t tile_rows(std::int64_t tile, std::int64_t rows) const {
    return std::min(kTileLanes, rows - tile * kTileLanes);
  }
  float* query_tile(std::int64_t tile) const {
    return scratch_.query + tile * kTileLanes * problem_.head_dim;
  }
  float* sums_tile(std::int64_t tile) const {
    return scratch_.sums + tile * kTileLanes * problem_.head_dim;
  }

  /// At most forward_chunk rows [first, last) of residue `offset` in one segment of one branch.
  struct Piece {
    std::size_t rank;  // in the order of branches
    std::size_t branch;
    BranchGeometry geometry;
    std::int64_t segment;
    std::int64_t offset;
    std::int64_t first;
    std::int64_t last;
  };

  /// First non-empty piece from row `row` of segment `segment` of branch order[rank] on; rank =
  /// order.size() if none is left.
  Piece find_piece(const std::vector<std::size_t>& order, std::size_t rank, std::int64_t segment,
                   std::int64_t row) const {
    const std::int64_t chunk = cpu::forward_chunk(problem_);
    for (; rank < order.size(); ++rank, segment = row = 0) {
      const std::size_t branch = order[rank];
      const std::int64_t offset = offset_of(branch);
      if (offset < 0) {
        continue;
      }
      const BranchGeometry geometry = geometry_of(branch);
      segment = std::max(segment, begin_ / geometry.segment);
      for (; segment <= (end_ - 1) / geometry.segment; ++segment, row = 0) {
        const std::int64_t first = std::max(row, geometry.first_row_at(segment, offset, begin_));
        const std::int64_t last = geometry.first_row_at(segment, offset, end_);
        if (first < last) {
          return {rank, branch, geometry, segment, offset, first, std::min(last, first + chunk)};
        }
      }
    }
    return {order.size(), 0, geometry_of(0), 0, 0, 0, 0};
  }

  /// Adds rows [first, last) of a piece's class to the rows to prefetch.
  void expect(const ConstTensorView& view, std::int64_t head, const Piece& piece,
              std::int64_t first, std::int64_t last) {
    if (first < last) {
      const std::int64_t at =
          sequence_.start + piece.geometry.position(piece.segment, piece.offset, first);
      const std::int64_t size = size_of(problem_.dtype);
      upcoming_.add(cpu::row_at(view, sequence_.batch, at, head),
                    piece.geometry.dilation * view.strides[1] * size, last - first,
                    head_dim_ * static_cast<std::size_t>(size));
    }
  }

  std::int64_t seen_keys(const Piece& piece) const {
    return problem_.is_causal ? piece.last : piece.geometry.rows(piece.segment, piece.offset);
  }

  /// What is packed after the keys before `next_key`: the next keys, or the start of the next
  /// piece.
  void expect_after(const Piece& piece, std::int64_t next_key, const Piece* next_piece) {
    upcoming_.clear();
    if (next_key < seen_keys(piece)) {
      const std::int64_t end = std::min(next_key + kForwardKeys, seen_keys(piece));
      expect(tensors_.key, kv_head_, piece, next_key, end);
      expect(tensors_.value, kv_head_, piece, next_key, end);
    } else if (next_piece != nullptr) {
      const std::int64_t end = std::min(kForwardKeys, seen_keys(*next_piece));
      expect(tensors_.query, head_, *next_piece, next_piece->first, next_piece->last);
      expect(tensors_.key, kv_head_, *next_piece, 0, end);
      expect(tensors_.value, kv_head_, *next_piece, 0, end);
    }
    constexpr std::int64_t kBlocksPerTile =
        kForwardKeys / static_cast<std::int64_t>(block_rows(kPanelVectors));
    upcoming_.spread(kBlocksPerTile * ceil_div(piece.last - piece.first, kTileLanes));
  }

  /// The queries of a piece against all keys of its segment.
  void attend(const Piece& piece, const Piece* next_piece) {
    const auto& [rank, branch, geometry, segment, offset, first, last] = piece;
    const std::int64_t rows = last - first;
    const std::int64_t tiles = ceil_div(rows, kTileLanes);
    for (std::int64_t t = 0; t < tiles; ++t) {
      pack_queries(geometry.position(segment, offset, first + t * kTileLanes), geometry.dilation, t,
                   tile_rows(t, rows));
    }
    const std::int64_t keys = seen_keys(piece);
    for (std::int64_t k = 0; k < keys; k += kForwardKeys) {
      const std::int64_t packed =
          pack_keys(geometry, segment, offset, k, std::min(k + kForwardKeys, keys));
      if (packed == 0) {
        continue;
      }
      expect_after(piece, k + kForwardKeys, next_piece);
      for (std::int64_t t = 0; t < tiles; ++t) {
        const std::int64_t tile_first = first + t * kTileLanes;
        const std::int64_t tile_last = tile_first + tile_rows(t, rows) - 1;
        std::int64_t visible = packed;
        if (problem_.is_causal) {
          visible = std::upper_bound(scratch_.key_row, scratch_.key_row + packed, tile_last) -
                    scratch_.key_row;
        }
        if (visible > 0) {
          const bool diagonal = problem_.is_causal && scratch_.key_row[visible - 1] > tile_first;
          update(branch, geometry, segment, offset, t, tile_first, tile_rows(t, rows), visible,
                 diagonal);
        }
      }
    }
    const bool phantom = problem_.tail == Tail::kPhantom && !problem_.is_causal;
    const std::int64_t phantoms = phantom ? geometry.phantoms(segment, offset) : 0;
    for (std::int64_t t = 0; t < tiles; ++t) {
      finish(branch, geometry, segment, offset, t, first + t * kTileLanes, tile_rows(t, rows),
             phantoms);
    }
  }

  /// Queries of one tile as columns, times scale * log2(e), and the empty softmax state.
  void pack_queries(std::int64_t position, std::int64_t dilation, std::int64_t tile,
                    std::int64_t rows) {
    float* const columns = query_tile(tile);
    const auto factor = static_cast<float>(plan_.scale() * cpu::kLog2E);
    for (std::int64_t i = 0; i < rows; ++i) {
      const std::byte* row = cpu::row_at(tensors_.query, sequence_.batch,
                                         sequence_.start + position + i * dilation, head_);
      load_row(problem_.dtype, row, head_dim_, factor,
               scratch_.rows + static_cast<std::size_t>(i) * padded_, padded_);
    }
    // Lanes beyond the last row are computed and never read, but must stay finite.
    std::fill(scratch_.rows + static_cast<std::size_t>(rows) * padded_,
              scratch_.rows + kTileLanes * padded_, 0.0f);
    transpose(scratch_.rows, padded_, kTileLanes, head_dim_, columns, kTileLanes);
    std::fill_n(sums_tile(tile), head_dim_ * kTileLanes, 0.0f);
    std::fill_n(scratch_.row_max + tile * kTileLanes, kTileLanes, kMinusInfinity);
    std::fill_n(scratch_.row_sum + tile * kTileLanes, kTileLanes, 0.0f);
  }

  /// Keys [first, last) of a segment that take part; masked ones are left out, not multiplied by
  /// zero.
  std::int64_t pack_keys(const BranchGeometry& geometry, std::int64_t segment, std::int64_t offset,
                         std::int64_t first, std::int64_t last) {
    std::size_t packed = 0;
    for (std::int64_t i = first; i < last; ++i) {
      const std::int64_t position = geometry.position(segment, offset, i);
      if (!keys_(position)) {
        continue;
      }
      const std::int64_t at = sequence_.start + position;
      load_row(problem_.dtype, cpu::row_at(tensors_.key, sequence_.batch, at, kv_head_), head_dim_,
               1.0f, scratch_.key + packed * head_dim_, head_dim_);
      load_row(problem_.dtype, cpu::row_at(tensors_.value, sequence_.batch, at, kv_head_),
               head_dim_, 1.0f, scratch_.value + packed * head_dim_, head_dim_);
      scratch_.key_row[packed++] = i;
    }
    return static_cast<std::int64_t>(packed);
  }

  /// One query tile against the packed keys.
  void update(std::size_t branch, const BranchGeometry& geometry, std::int64_t segment,
              std::int64_t offset, std::int64_t tile, std::int64_t tile_first, std::int64_t rows,
              std::int64_t visible, bool diagonal) {
    const auto keys = static_cast<std::size_t>(visible);
    const auto lanes = static_cast<std::size_t>(rows);
    const auto stride = static_cast<std::ptrdiff_t>(head_dim_);
    float* const score = scratch_.score;
    const ScoreTile score_tile{score, scratch_.tile_max, scratch_.rescale};
    std::fill_n(scratch_.tile_max, kTileLanes, kMinusInfinity);
    multiply(Broadcast{scratch_.key, stride, 1}, keys, head_dim_, query_tile(tile), kTileLanes,
             lanes, StoreScores{score, scratch_.tile_max, &upcoming_});
    if (diagonal) {
      hide_later_keys(score_tile, scratch_.key_row, tile_first, keys, lanes);
    }
    softmax(score_tile, keys, lanes, scratch_.row_max + tile * kTileLanes,
            scratch_.row_sum + tile * kTileLanes);
    if (problem_.dropout_p > 0.0) {
      const cpu::Dropout dropout(problem_, tensors_.masks, sequence_index_, head_, branch);
      for (std::size_t k = 0; k < keys; ++k) {
        const std::int64_t key = geometry.position(segment, offset, scratch_.key_row[k]);
        for (std::int64_t i = 0; i < rows; ++i) {
          score[static_cast<std::int64_t>(k) * kTileLanes + i] *=
              dropout(geometry.position(segment, offset, tile_first + i), key);
        }
      }
    }
    multiply(Broadcast{scratch_.value, 1, stride}, head_dim_, keys, score, kTileLanes, lanes,
             RescaleAndAdd{sums_tile(tile), scratch_.rescale});
  }

  /// Adds phantom keys, normalises one tile and merges (O_b, l_b) into the block's rows.
  void finish(std::size_t branch, const BranchGeometry& geometry, std::int64_t segment,
              std::int64_t offset, std::int64_t tile, std::int64_t tile_first, std::int64_t rows,
              std::int64_t phantoms) {
    const float* const row_max = scratch_.row_max + tile * kTileLanes;
    const float* const row_sum = scratch_.row_sum + tile * kTileLanes;
    transpose(sums_tile(tile), kTileLanes, head_dim_, static_cast<std::size_t>(rows), scratch_.rows,
              padded_);
    for (std::int64_t i = 0; i < rows; ++i) {
      float factor = 0.0f;
      float lse = kMinusInfinity;
      if (phantoms > 0) {
        const float top = std::max(row_max[i], 0.0f);
        const float shrink = std::exp2(row_max[i] - top);
        const float sum = row_sum[i] * shrink + static_cast<float>(phantoms) * std::exp2(-top);
        factor = shrink / sum;
        lse = top * kLn2 + std::log(sum);
      } else if (row_max[i] != kMinusInfinity) {
        factor = 1.0f / row_sum[i];
        lse = row_max[i] * kLn2 + std::log(row_sum[i]);
      }
      float* const row = scratch_.rows + static_cast<std::size_t>(i) * padded_;
      std::transform(row, row + head_dim_, row, [factor](float x) { return factor * x; });
      std::fill(row + head_dim_, row + padded_, 0.0f);
      const std::int64_t position = geometry.position(segment, offset, tile_first + i);
      merge(position - begin_, row, lse);
      if (plan_.needs_branch_outputs() && tensors_.branch_out.defined()) {
        const std::int64_t at = plan_.branch_row_begin(branch, sequence_index_) +
                                segment * geometry.slots() + tile_first + i;
        const TensorView& out = tensors_.branch_out;
        std::copy_n(row, head_dim_,
                    static_cast<float*>(out.data) + sequence_.batch * out.strides[0] +
                        head_ * out.strides[1] + at * out.strides[2]);
        cpu::item_at(tensors_.branch_lse, sequence_.batch, head_, at) = lse;
      }
    }
  }

  void merge(std::int64_t row, const float* branch_row, float branch_lse) {
    float* const out = scratch_.state_out + static_cast<std::size_t>(row) * padded_;
    const MergeWeights<float> weights = merge_weights(scratch_.state_lse[row], branch_lse);
    scratch_.state_lse[row] = weights.lse;
    if (problem_.merge == Merge::kLse) {
      blend_row(weights.first, weights.second, branch_row, padded_, out);
    } else {
      blend_row(1.0f, 1.0f, branch_row, padded_, out);
    }
  }

  void write_rows() {
    const auto out_scale = static_cast<float>(problem_.out_scale);
    for (std::int64_t p = begin_; p < end_; ++p) {
      float* const row = scratch_.state_out + static_cast<std::size_t>(p - begin_) * padded_;
      float factor = out_scale;
      if (problem_.merge == Merge::kMean) {  // a row that no branch covers is zero anyway
        factor /= static_cast<float>(
            std::max(1, cpu::covering_branches(problem_, sequence_.length, head_, p)));
      }
      if (factor != 1.0f) {
        for (std::size_t c = 0; c < head_dim_; ++c) {
          row[c] *= factor;
        }
      }
      store_row(problem_.dtype, row, head_dim_,
                cpu::row_at(tensors_.out, sequence_.batch, sequence_.start + p, head_));
      cpu::item_at(tensors_.lse, sequence_.batch, head_, sequence_.start + p) =
          scratch_.state_lse[p - begin_];
    }
  }

  const Plan& plan_;
  const Problem& problem_;
  const ForwardTensors& tensors_;
  const ForwardScratch& scratch_;
  std::size_t sequence_index_;
  const Sequence& sequence_;
  std::int64_t head_;
  std::int64_t kv_head_;
  std::int64_t begin_;
  std::int64_t end_;
  std::size_t head_dim_;
  std::size_t padded_;
  cpu::KeyFilter keys_;
  RowStream upcoming_;
};

}  // namespace

void forward_on_target(const Plan& plan, const ForwardTensors& tensors, const Context& context) {
  const Problem& problem = plan.problem();
  const std::vector<std::size_t> order = cpu::ascending_branches(problem);
  const int threads = context.parallel_for->num_threads();
  const std::int64_t block = cpu::forward_block(problem, threads);
  const cpu::ItemRange items(plan.sequences(), problem.num_heads,
                             [block](std::int64_t length) { return ceil_div(length, block); });
  const std::int64_t bytes = cpu::scratch_bytes<ForwardScratch>(problem, threads);
  context.parallel_for->run(items.size(), [&](std::int64_t begin, std::int64_t end, int thread) {
    cpu::Carver carver(context.workspace.data() + thread * bytes);
    const ForwardScratch scratch(carver, problem, threads);
    items.visit(begin, end, [&](const cpu::Item& item) {
      ForwardBlock(plan, tensors, scratch, block, item).run(order);
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
