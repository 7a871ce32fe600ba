// Tiles of work on Hopper: what they are, who looks them up, how they are handed out.
#pragma once

#include <cstdint>
#include <iterator>
#include <utility>

#include "src/kernels/cuda/device/element.cuh"
#include "src/kernels/cuda/device/piece.cuh"
#include "src/kernels/cuda/device/ptx.cuh"
#include "src/kernels/cuda/tensor_map.cuh"

namespace dilated::gpu::sm90 {

inline constexpr int kPanelColumns = 64;  // 128 bytes, what one swizzled row of shared memory holds
inline constexpr int kRowPieces = 8;      // of 16 bytes

/// Panels of a row.
constexpr int count_panels(int head_dim) { return (head_dim + kPanelColumns - 1) / kPanelColumns; }

/// run<kHeadDim>() of the kernel that takes `head_dim`.
template <typename Run>
void for_head_dim(int head_dim, const Run& run) {
  const auto tries = [&]<std::size_t... kIndex>(std::index_sequence<kIndex...>) {
    static_cast<void>(((head_dim <= kHopperHeadDims[kIndex] &&
                        (run.template operator()<kHopperHeadDims[kIndex]>(), true)) ||
                       ...));
  };
  tries(std::make_index_sequence<std::size(kHopperHeadDims)>());
}

/// First row in a tile of the 64 that this thread's warpgroup owns; the first warpgroup owns none.
/// The compiler sees that it is the same in a warp: descriptors stay in uniform registers.
__device__ inline int first_row_of_warpgroup() {
  return __shfl_sync(0xFFFFFFFFu, static_cast<int>(threadIdx.x) / 128 * 64 - 64, 0);
}

/// The tiles of one launch; which is next is counted by `ticket`.
struct TileRange {
  const TileGroup* groups;
  int num_groups;
  std::int64_t first_tile;  // of these groups
  std::int64_t num_tiles;   // of all heads
  int* ticket;
};

/// Rows of a class of a segment; none if last <= first.
struct TileRows {
  int first, last;

  __device__ int tiles(int rows_per_tile) const {
    return (max(0, last - first) + rows_per_tile - 1) / rows_per_tile;
  }
};

/// A block of query rows and the keys that some of them see; or a block of key rows and the queries
/// that see some of them. Rows are numbers in the class of the segment.
struct Tile {
  int branch, sequence, batch, head;
  TileRows queries, keys;
  // Row 0 of the class in the tensor maps: residue, row.
  int query_residue, query_row;
  int key_residue, key_row;
  std::int64_t saved;   // row 0 in branch results
  std::int64_t token;   // row 0 in the query tensor; each further row is `dilation` tokens on
  std::int64_t length;  // of the sequence
  std::int64_t position;
  bool is_end;
  bool has_bad_values;  // set by guards

  /// Keys of a query row, counted from the first.
  template <bool kCausal>
  __device__ int seen(int row) const {
    return (kCausal ? min(keys.last, row + 1) : keys.last) - keys.first;
  }
};

/// Tile `index` of a launch; false if it has no rows. Blocks of one head and segment are
/// neighbours, so that they share what passes by in the cache; longest first if causal.
template <bool kCausal, int kRows, bool kOfQueries>
__device__ inline bool find_tile(const Call& call, const TileRange& range, std::int64_t index,
                                 Tile& tile) {
  const TileGroup& group =
      group_of(range.groups, range.num_groups, range.first_tile + index / call.num_heads);
  const auto inside =
      static_cast<unsigned>(index - (group.first_tile - range.first_tile) * call.num_heads);
  const auto blocks = static_cast<unsigned>(group.tiles_per_segment);
  const auto heads = static_cast<unsigned>(call.num_heads);
  const unsigned block = kCausal && kOfQueries ? blocks - 1 - inside % blocks : inside % blocks;
  tile.head = static_cast<int>(inside / blocks % heads);
  Piece piece;
  if (!find_piece(call, range.groups, range.num_groups,
                  group.first_tile + std::int64_t{inside / blocks / heads} * blocks + block,
                  tile.head, piece)) {
    return false;
  }
  const auto span = [](const RowSpan& rows) {
    return TileRows{static_cast<int>(rows.first), static_cast<int>(rows.last)};
  };
  tile.queries = span(piece.queries);
  tile.keys = span(piece.keys);
  TileRows& own = kOfQueries ? tile.queries : tile.keys;
  own.first += static_cast<int>(piece.tile) * kRows;
  own.last = min(own.first + kRows, own.last);
  if (own.first >= own.last) {
    return false;
  }
  if (kCausal && kOfQueries) {
    tile.keys.last = min(tile.keys.last, own.last);
  } else if (kCausal) {
    tile.queries.first = max(tile.queries.first, own.first);
  }
  tile.branch = piece.branch;
  tile.sequence = piece.sequence_index;
  tile.batch = static_cast<int>(piece.sequence.batch);
  // Rows before the window have negative numbers.
  const auto place = [&](std::int64_t origin, int& residue, int& row) {
    const auto step = static_cast<int>(piece.geometry.dilation);
    const auto at = static_cast<int>(origin);
    row = at / step - (at % step < 0 ? 1 : 0);
    residue = at - row * step;
  };
  place(piece.queries.origin, tile.query_residue, tile.query_row);
  place(piece.keys.origin, tile.key_residue, tile.key_row);
  tile.saved = piece.saved_row(0);
  tile.token = piece.queries.origin;
  tile.length = piece.sequence.length;
  tile.position = piece.position(0);
  tile.is_end = false;
  tile.has_bad_values = false;
  return true;
}

/// Index and parity of a ring of `kStages` buffers.
template <int kStages>
struct Ring {
  int stage = 0;
  std::uint32_t parity = 0;

  __device__ void step() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

/// Of one warp, after all its threads have come here.
__device__ inline void arrive_warp(Barrier& barrier) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) {
    barrier.arrive();
  }
}

/// One thread looks tiles up, one ahead of the warps that read them.
struct TileQueue {
  Barrier full[2], empty[2];
  Tile tile[2];

  __device__ void init(std::uint32_t readers) {
    for (int i = 0; i < 2; ++i) {
      full[i].init(1);
      empty[i].init(readers);
    }
  }

  /// `find` sets a tile or says that it has no rows.
  template <typename Find>
  __device__ void write(const TileRange& range, const Find& find) {
    Ring<2> at;
    std::int64_t index = blockIdx.x;
    for (;;) {
      const auto step = [&] { index = std::int64_t{gridDim.x} + atomicAdd(range.ticket, 1); };
      Tile next;
      next.is_end = true;
      while (index < range.num_tiles && !find(index, next)) {
        step();
      }
      const bool is_end = index >= range.num_tiles;
      next.is_end = is_end;
      empty[at.stage].wait(at.parity ^ 1);
      tile[at.stage] = next;
      full[at.stage].arrive();
      at.step();
      if (is_end) {
        return;
      }
      step();
    }
  }

  /// By one warp, or by one thread of it alone; work(tile, its place and parity in the queue).
  template <bool kOneThread = false, typename Work>
  __device__ void read(const Work& work) {
    Ring<2> at;
    for (;;) {
      full[at.stage].wait(at.parity);
      Tile& next = tile[at.stage];
      if (next.is_end) {
        return;
      }
      work(next, at);
      if constexpr (kOneThread) {
        empty[at.stage].arrive();
      } else {
        arrive_warp(empty[at.stage]);
      }
      at.step();
    }
  }
};

/// Loads all panels of rows from `row` on.
template <typename Element, int kPanels, int kElements>
__device__ inline void load_rows(Element (&to)[kPanels][kElements], const DilatedMaps& maps,
                                 int row, int residue, int head, int batch, Barrier& barrier) {
#pragma unroll
  for (int panel = 0; panel < kPanels; ++panel) {
    load_box(to[panel], maps.at(residue), kPanelColumns * panel, row, residue, head, batch,
             barrier);
  }
}

/// Whether one of 8 elements is infinite or NaN: a carry out of an exponent of ones.
template <typename Element>
__device__ inline bool has_bad(const uint4& eight) {
  constexpr bool kIsBFloat16 = std::is_same_v<Element, __nv_bfloat16>;
  constexpr std::uint32_t kExponents = kIsBFloat16 ? 0x7F807F80u : 0x7C007C00u;
  constexpr std::uint32_t kOne = kIsBFloat16 ? 0x00800080u : 0x04000400u;
  const auto carry = [](std::uint32_t pair) { return (pair & kExponents) + kOne; };
  return ((carry(eight.x) | carry(eight.y) | carry(eight.z) | carry(eight.w)) & 0x80008000u) != 0;
}

/// Zeros in place of those.
template <typename Element>
__device__ inline void clear_bad(uint4& eight) {
  auto* const elements = reinterpret_cast<Element*>(&eight);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float x = float_of(elements[i]);
    elements[i] = element_of<Element>(isfinite(x) ? x : 0.0f);
  }
}

/// Adds what guards took away: elements of a row that are not finite, to those sums of this
/// thread's two rows that see it. Their weight does not matter.
template <typename Element, int kCount>
__device__ inline void add_bad_row(float (&sums)[kCount], const std::byte* row, int columns,
                                   bool first_sees, bool second_sees) {
  const auto* const elements = reinterpret_cast<const Element*>(row);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (i / 4 * 8 >= columns) {
      continue;
    }
    const float x = float_of(elements[i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2]);
    if (!isfinite(x) && (i / 2 % 2 == 0 ? first_sees : second_sees)) {
      sums[i] += x;
    }
  }
}

/// Where parts of other branches lie that the rows of a tile will add in the end: slots by (rank -
/// 1, row of the tile). A warp of its own looks them up meanwhile.
template <int kRows>
struct PartSlots {
  int slot[kMostBranches - 1][kRows];
  Barrier found;

  /// By one warp; `use(rank, row, slot)` asks for what lies there.
  template <typename Use>
  __device__ void find(const Call& call, const Tile& tile, const TileRows& rows, const Use& use) {
    for (int rank = 1; rank < call.num_branches; ++rank) {
      const SlotFinder find(call, tile.sequence, tile.length, rank, tile.head);
#pragma unroll
      for (int i = static_cast<int>(threadIdx.x) % 32; i < kRows; i += 32) {
        const std::int64_t at = rows.first + i < rows.last
                                    ? find(static_cast<int>(tile.position) + rows.first + i)
                                    : -1;
        slot[rank - 1][i] = static_cast<int>(at);
        if (at >= 0) {
          use(rank, i, at);
        }
      }
    }
    arrive_warp(found);
  }
};

__device__ inline void prefetch_row(const float* row, int columns) {
  for (int c = 0; c < columns; c += 32) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(row + c));
  }
}

/// Clears rows of a loaded tile from `end` on. Whether a row from `begin` to there is not finite,
/// as far as this thread of `threads` sees; kClears: it is from now on.
template <bool kFinds, bool kClears, int kRows, typename Element, int kPanels, int kElements>
__device__ inline bool guard_rows(Element (&tile)[kPanels][kElements], int begin, int end,
                                  int thread, int threads) {
  static_assert(kElements == kRows * kPanelColumns);
  const auto for_each_piece = [&](int first, int last, const auto& work) {
#pragma unroll 2
    for (int i = max(0, first) * kRowPieces + thread; i < min(last, kRows) * kRowPieces;
         i += threads) {
#pragma unroll
      for (int panel = 0; panel < kPanels; ++panel) {
        work(reinterpret_cast<uint4*>(tile[panel])[i]);
      }
    }
  };
  bool is_bad = false;
  if constexpr (kFinds) {
    for_each_piece(begin, end, [&](const uint4& piece) { is_bad |= has_bad<Element>(piece); });
    if (kClears && is_bad) {
      for_each_piece(begin, end, [](uint4& piece) { clear_bad<Element>(piece); });
    }
  }
  for_each_piece(end, kRows, [](uint4& piece) { piece = uint4{0, 0, 0, 0}; });
  fence_async_proxy();
  return is_bad;
}

}  // namespace dilated::gpu::sm90
