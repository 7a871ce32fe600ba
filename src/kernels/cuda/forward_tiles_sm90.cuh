// What a tile of forward on Hopper is, who looks it up and who loads it
// (attention_forward_sm90.cuh).
#pragma once

#include <cstdint>

#include "src/kernels/cuda/device/piece.cuh"
#include "src/kernels/cuda/device/ptx.cuh"
#include "src/kernels/cuda/device/softmax.cuh"
#include "src/kernels/cuda/tensor_map.cuh"

namespace dilated::gpu::sm90 {

inline constexpr int kPanelColumns = 64;  // 128 bytes, what one swizzled row of shared memory holds
inline constexpr int kRowPieces = 8;       // of 16 bytes

struct BranchMaps {
  DilatedMaps query, key, value;
};

struct ForwardArguments {
  Call call;
  BranchMaps maps[kMostBranches];  // by number of the branch
  const TileGroup* groups;         // of this launch
  int num_groups;
  std::int64_t first_tile;  // of these groups
  std::int64_t num_tiles;   // of all heads
  ConstTensorView value;
  TensorView branch_out;
  TensorView branch_lse;
  float2* branch_sums;
  TensorView out;
  RowView lse;
  RowView lse_residual;
  int* ticket;
};

/// Query rows and stages per head_dim.
template <int kHeadDim>
struct ForwardTiles {
  static constexpr int kRows = forward_rows(kHeadDim);
  static constexpr int kWarpgroups = kRows / 64;
  static constexpr int kKeys = kForwardKeys;
  static constexpr int kStages = 2;
  static constexpr int kPanels = kHeadDim / kPanelColumns;
  static constexpr int kThreads = 128 * (kWarpgroups + 1);
  static constexpr int kProducerRegisters = kWarpgroups == 3 ? 32 : 24;
  static constexpr int kConsumerRegisters = kWarpgroups == 3 ? 160 : 240;
};

/// What a tile is. Rows are numbers in the class of its segment.
struct QueryTile {
  int branch, sequence, batch, head;
  int first, last;            // query rows
  int keys_first, keys_last;  // keys that some row sees; none: last <= first
  // Row 0 of the class in the tensor maps: residue, row.
  int query_residue, query_row;
  int key_residue, key_row;
  std::int64_t saved;   // row 0 in branch results
  std::int64_t token;   // row 0 in the query tensor; each further row is `dilation` tokens on
  std::int64_t length;  // of the sequence
  std::int64_t position;
  bool is_end;
  bool has_bad_values;  // see guard()

  __device__ int key_tiles(int keys_per_tile) const {
    return (max(0, keys_last - keys_first) + keys_per_tile - 1) / keys_per_tile;
  }
  /// Keys of a row, counted from the tile's first.
  template <bool kCausal>
  __device__ int seen(int row) const {
    return (kCausal ? min(keys_last, row + 1) : keys_last) - keys_first;
  }
};

template <typename Element, int kHeadDim>
struct alignas(1024) ForwardShared {
  using Tiles = ForwardTiles<kHeadDim>;
  Element query[Tiles::kPanels][Tiles::kRows * kPanelColumns];
  Element key[Tiles::kStages][Tiles::kPanels][Tiles::kKeys * kPanelColumns];
  Element value[Tiles::kStages][Tiles::kPanels][Tiles::kKeys * kPanelColumns];
  Barrier query_full, query_empty;
  Barrier key_full[Tiles::kStages], key_empty[Tiles::kStages];
  Barrier value_full[Tiles::kStages], value_clean[Tiles::kStages], value_empty[Tiles::kStages];
  Barrier tile_full[2], tile_empty[2];
  QueryTile tile[2];
};

/// Tile `index` of a launch; false if it has no rows. Blocks of one head and segment are
/// neighbours, longest first if causal, so that they share keys in the cache.
template <bool kCausal, int kRows>
__device__ inline bool find_tile(const ForwardArguments& arguments, std::int64_t index,
                                 QueryTile& tile) {
  const Call& call = arguments.call;
  const TileGroup& group = group_of(arguments.groups, arguments.num_groups,
                                    arguments.first_tile + index / call.num_heads);
  const auto inside =
      static_cast<unsigned>(index - (group.first_tile - arguments.first_tile) * call.num_heads);
  const auto blocks = static_cast<unsigned>(group.tiles_per_segment);
  const auto heads = static_cast<unsigned>(call.num_heads);
  const unsigned block = kCausal ? blocks - 1 - inside % blocks : inside % blocks;
  tile.head = static_cast<int>(inside / blocks % heads);
  Piece piece;
  if (!find_piece(call, arguments.groups, arguments.num_groups,
                  group.first_tile + std::int64_t{inside / blocks / heads} * blocks + block,
                  tile.head, piece)) {
    return false;
  }
  const std::int64_t first = piece.queries.first + piece.tile * kRows;
  const std::int64_t last = min(first + kRows, piece.queries.last);
  if (first >= last) {
    return false;
  }
  tile.branch = piece.branch;
  tile.sequence = piece.sequence_index;
  tile.batch = static_cast<int>(piece.sequence.batch);
  tile.first = static_cast<int>(first);
  tile.last = static_cast<int>(last);
  tile.keys_first = static_cast<int>(piece.keys.first);
  tile.keys_last = static_cast<int>(kCausal ? min(piece.keys.last, last) : piece.keys.last);
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

/// One thread looks up one tile ahead of the others.
template <typename Element, int kHeadDim, bool kCausal>
__device__ inline void schedule(const ForwardArguments& arguments,
                                ForwardShared<Element, kHeadDim>& shared) {
  Ring<2> queue;
  std::int64_t index = blockIdx.x;
  for (;;) {
    const auto step = [&] { index = std::int64_t{gridDim.x} + atomicAdd(arguments.ticket, 1); };
    QueryTile tile;
    tile.is_end = true;
    while (index < arguments.num_tiles &&
           !find_tile<kCausal, ForwardTiles<kHeadDim>::kRows>(arguments, index, tile)) {
      step();
    }
    const bool is_end = index >= arguments.num_tiles;
    tile.is_end = is_end;
    shared.tile_empty[queue.stage].wait(queue.parity ^ 1);
    shared.tile[queue.stage] = tile;
    shared.tile_full[queue.stage].arrive();
    queue.step();
    if (is_end) {
      return;
    }
    step();
  }
}

template <typename Element, int kHeadDim>
__device__ inline void produce(const ForwardArguments& arguments,
                               ForwardShared<Element, kHeadDim>& shared) {
  using Tiles = ForwardTiles<kHeadDim>;
  constexpr std::uint32_t kQueryBytes = sizeof(shared.query);
  constexpr std::uint32_t kKeyBytes = sizeof(shared.key[0]);
  Ring<Tiles::kStages> keys, values;
  Ring<2> queue;
  Ring<1> queries;
  for (;;) {
    shared.tile_full[queue.stage].wait(queue.parity);
    const QueryTile& tile = shared.tile[queue.stage];
    if (tile.is_end) {
      return;
    }
    const int count = tile.key_tiles(Tiles::kKeys);
    if (count > 0) {
      const BranchMaps& maps = arguments.maps[tile.branch];
      const int kv_head = tile.head / arguments.call.heads_per_kv_head;
      const int batch = tile.batch;
      const int residue = tile.key_residue;
      const int row = tile.key_row + tile.keys_first;
      const CUtensorMap& key_map = maps.key.at(residue);
      const CUtensorMap& value_map = maps.value.at(residue);
      const auto load_key = [&](int n) {
        shared.key_empty[keys.stage].wait(keys.parity ^ 1);
        shared.key_full[keys.stage].arrive_and_expect(kKeyBytes);
#pragma unroll
        for (int panel = 0; panel < Tiles::kPanels; ++panel) {
          load_box(shared.key[keys.stage][panel], key_map, kPanelColumns * panel,
                   row + n * Tiles::kKeys, residue, kv_head, batch, shared.key_full[keys.stage]);
        }
        keys.step();
      };
      const auto load_value = [&](int n) {
        shared.value_empty[values.stage].wait(values.parity ^ 1);
        shared.value_full[values.stage].arrive_and_expect(kKeyBytes);
#pragma unroll
        for (int panel = 0; panel < Tiles::kPanels; ++panel) {
          load_box(shared.value[values.stage][panel], value_map, kPanelColumns * panel,
                   row + n * Tiles::kKeys, residue, kv_head, batch,
                   shared.value_full[values.stage]);
        }
        values.step();
      };

      load_key(count - 1);
      shared.query_empty.wait(queries.parity ^ 1);
      shared.query_full.arrive_and_expect(kQueryBytes);
#pragma unroll
      for (int panel = 0; panel < Tiles::kPanels; ++panel) {
        load_box(shared.query[panel], maps.query.at(tile.query_residue), kPanelColumns * panel,
                 tile.query_row + tile.first, tile.query_residue, tile.head, batch,
                 shared.query_full);
      }
      queries.step();
      for (int n = count - 2; n >= 0; --n) {
        load_key(n);
        load_value(n + 1);
      }
      load_value(0);
    }
    shared.tile_empty[queue.stage].arrive();
    queue.step();
  }
}

/// One warp hands every value tile on. 0 * NaN must reach nobody: it clears what lies beyond the keys,
/// and what is not finite where causal rows do not see it; rows that do get that back in the end.
template <typename Element, int kHeadDim, bool kCausal>
__device__ inline void guard(ForwardShared<Element, kHeadDim>& shared) {
  using Tiles = ForwardTiles<kHeadDim>;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  Ring<Tiles::kStages> values;
  Ring<2> queue;
  for (;;) {
    shared.tile_full[queue.stage].wait(queue.parity);
    QueryTile& tile = shared.tile[queue.stage];
    if (tile.is_end) {
      return;
    }
    const int everyone_sees = tile.seen<kCausal>(tile.first);
    const int someone_sees = tile.keys_last - tile.keys_first;
    for (int n = tile.key_tiles(Tiles::kKeys) - 1; n >= 0; --n) {
      shared.value_full[values.stage].wait(values.parity);
      const int begin = max(0, everyone_sees - n * Tiles::kKeys);
      const int end = someone_sees - n * Tiles::kKeys;
      if (begin < Tiles::kKeys) {
        bool is_bad = false;
        for (int i = begin * kRowPieces + lane; i < Tiles::kKeys * kRowPieces; i += 32) {
#pragma unroll
          for (int panel = 0; panel < Tiles::kPanels; ++panel) {
            uint4& piece = reinterpret_cast<uint4*>(shared.value[values.stage][panel])[i];
            if (i >= end * kRowPieces) {
              piece = uint4{0, 0, 0, 0};
            } else if (kCausal && has_bad<Element>(piece)) {
              clear_bad<Element>(piece);
              is_bad = true;
            }
          }
        }
        if (is_bad) {
          tile.has_bad_values = true;
        }
        fence_async_proxy();
      }
      __syncwarp();
      if (lane == 0) {
        shared.value_clean[values.stage].arrive();
      }
      values.step();
    }
    __syncwarp();
    if (lane == 0) {
      shared.tile_empty[queue.stage].arrive();
    }
    queue.step();
  }
}

}  // namespace dilated::gpu::sm90
