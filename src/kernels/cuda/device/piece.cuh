// Which rows a block works on: consecutive rows of one class of one segment.
#pragma once

#include <cstdint>

#include "src/dropout.h"
#include "src/geometry.h"
#include "src/kernels/cuda/call.h"
#include "src/masks.h"

namespace dilated::gpu {

/// The group that tile `tile` belongs to; empty groups are passed over.
__device__ inline const TileGroup& group_of(const TileGroup* groups, int count, std::int64_t tile) {
  int low = 0;
  int high = count;  // the answer lies in [low, high)
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (groups[middle].first_tile <= tile) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return groups[low];
}

/// The sequence as far as it is used.
__device__ inline Sequence used_sequence(const Call& call, int index) {
  const Sequence& whole = call.sequences[index];
  return call.masks.seqused == nullptr ? whole : whole.cut(call.masks.seqused[index]);
}

struct Piece {
  Sequence sequence;  // as far as it is used
  int sequence_index = 0;
  int branch = 0;
  std::int64_t segment = 0;
  std::int64_t offset = 0;
  std::int64_t tile = 0;       // number in its segment
  std::int64_t row_begin = 0;  // of its sequence and branch in saved rows
  BranchGeometry geometry{1, 1, 1};
  RowSpan queries{};
  RowSpan keys{};

  __device__ std::int64_t position(std::int64_t row) const {
    return geometry.position(segment, offset, row);
  }
  /// Row of the class in saved branch results.
  __device__ std::int64_t saved_row(std::int64_t row) const {
    return row_begin + geometry.slot(segment, row) - geometry.first_slot(sequence.queries.begin);
  }
};

/// What tile `tile` of the groups means for a head; false if there is nothing to do.
__device__ inline bool find_piece(const Call& call, const TileGroup* groups, int count,
                                  std::int64_t tile, int head, Piece& piece) {
  const TileGroup& group = group_of(groups, count, tile);
  piece.sequence = used_sequence(call, group.sequence);
  piece.sequence_index = group.sequence;
  piece.branch = group.branch;
  piece.row_begin = group.row_begin;
  piece.offset = call.offsets[std::int64_t{group.branch} * call.num_heads + head];
  if (piece.offset < 0 || piece.sequence.length == 0) {
    return false;
  }
  const BranchShape& shape = call.branches[group.branch];
  piece.geometry = BranchGeometry(piece.sequence.length, shape.segment, shape.dilation);
  const std::int64_t index = tile - group.first_tile;
  piece.segment = group.first_segment + index / group.tiles_per_segment;
  piece.tile = index % group.tiles_per_segment;
  if (piece.segment >= piece.geometry.num_segments()) {
    return false;
  }
  piece.queries = piece.geometry.span(piece.segment, piece.offset, piece.sequence.queries,
                                      piece.sequence.query_row);
  piece.keys =
      piece.geometry.span(piece.segment, piece.offset, piece.sequence.keys, piece.sequence.key_row);
  return true;
}

/// Positions of a head in the branch results of the branch of a rank. Of a whole sequence; numbers
/// of 32 bits.
class SlotFinder {
 public:
  __device__ SlotFinder(const Call& call, int sequence, std::int64_t length, int rank, int head) {
    const TileGroup& group = call.query_groups[rank * call.num_sequences + sequence];
    const BranchShape& shape = call.branches[group.branch];
    segment_ = static_cast<int>(min(shape.segment, length));
    dilation_ = static_cast<int>(shape.dilation);
    slots_ = segment_ / dilation_ + (segment_ % dilation_ != 0 ? 1 : 0);
    offset_ = static_cast<int>(call.offsets[std::int64_t{group.branch} * call.num_heads + head]);
    begin_ = group.row_begin;
  }

  /// -1 if the head does not see position `p` there.
  __device__ std::int64_t operator()(int p) const {
    const int segment = p / segment_;
    const int inside = p - segment * segment_;
    const int i = inside / dilation_;
    return inside - i * dilation_ == offset_ ? begin_ + std::int64_t{segment} * slots_ + i : -1;
  }

 private:
  int segment_, dilation_, slots_, offset_;
  std::int64_t begin_;
};

/// Factors of one (sequence, head, branch) by rows of the class: 1 / (1 - p) or 0.
struct RowDropout {
  Dropout dropout;
  std::int64_t first;  // position of row 0
  std::int64_t step;

  __device__ float operator()(std::int64_t query, std::int64_t key) const {
    return static_cast<float>(dropout(first + query * step, first + key * step));
  }
};

__device__ inline RowDropout dropout_of(const Call& call, const Piece& piece, int head) {
  const std::int64_t* const state = call.masks.dropout_state;
  const auto word = [state](int i) {
    return state == nullptr ? std::uint64_t{0} : static_cast<std::uint64_t>(state[i]);
  };
  return {{call.dropout_p, word(0), word(1),
           dropout_stream(piece.sequence_index, call.head_offset + head, call.all_heads,
                          static_cast<std::size_t>(piece.branch),
                          static_cast<std::size_t>(call.num_branches))},
          piece.position(0),
          piece.geometry.dilation};
}

}  // namespace dilated::gpu
