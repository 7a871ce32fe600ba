// What a tile of forward on Hopper needs, who loads it and who guards it
// (attention_forward_sm90.cuh).
#pragma once

#include <cstdint>

#include "src/kernels/cuda/tiles_sm90.cuh"

namespace dilated::gpu::sm90 {

struct BranchMaps {
  DilatedMaps query, key, value;
};

struct ForwardArguments {
  Call call;
  BranchMaps maps[kMostBranches];  // by number of the branch
  TileRange range;
  ConstTensorView value;
  TensorView branch_out;
  TensorView branch_lse;
  float2* branch_sums;
  TensorView out;
  RowView lse;
  RowView lse_residual;
};

/// Query rows and stages per head_dim.
template <int kHeadDim>
struct ForwardTiles {
  static constexpr int kRows = forward_rows(kHeadDim);
  static constexpr int kWarpgroups = kRows / 64;
  static constexpr int kKeys = kForwardKeys;
  static constexpr int kStages = 2;
  static constexpr int kPanels = count_panels(kHeadDim);
  static constexpr int kThreads = 128 * (kWarpgroups + 1);
  static constexpr int kProducerRegisters = kWarpgroups == 3 ? 32 : 24;
  static constexpr int kConsumerRegisters = kWarpgroups == 3 ? 160 : 240;
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
  TileQueue tiles;
  PartSlots<Tiles::kRows> parts[2];  // by place in the queue
  float2 part_sums[2][kMostBranches - 1][Tiles::kRows];
};

template <typename Element, int kHeadDim>
__device__ inline void produce(const ForwardArguments& arguments,
                               ForwardShared<Element, kHeadDim>& shared) {
  using Tiles = ForwardTiles<kHeadDim>;
  constexpr std::uint32_t kQueryBytes = sizeof(shared.query);
  constexpr std::uint32_t kKeyBytes = sizeof(shared.key[0]);
  Ring<Tiles::kStages> keys, values;
  Ring<1> queries;
  shared.tiles.template read<true>([&](const Tile& tile, Ring<2>) {
    const int count = tile.keys.tiles(Tiles::kKeys);
    if (count == 0) {
      return;
    }
    const BranchMaps& maps = arguments.maps[tile.branch];
    const int kv_head = tile.head / arguments.call.heads_per_kv_head;
    const int batch = tile.batch;
    const int residue = tile.key_residue;
    const int row = tile.key_row + tile.keys.first;
    const auto load_key = [&](int n) {
      shared.key_empty[keys.stage].wait(keys.parity ^ 1);
      shared.key_full[keys.stage].arrive_and_expect(kKeyBytes);
      load_rows(shared.key[keys.stage], maps.key, row + n * Tiles::kKeys, residue, kv_head, batch,
                shared.key_full[keys.stage]);
      keys.step();
    };
    const auto load_value = [&](int n) {
      shared.value_empty[values.stage].wait(values.parity ^ 1);
      shared.value_full[values.stage].arrive_and_expect(kKeyBytes);
      load_rows(shared.value[values.stage], maps.value, row + n * Tiles::kKeys, residue, kv_head,
                batch, shared.value_full[values.stage]);
      values.step();
    };

    load_key(count - 1);
    shared.query_empty.wait(queries.parity ^ 1);
    shared.query_full.arrive_and_expect(kQueryBytes);
    load_rows(shared.query, maps.query, tile.query_row + tile.queries.first, tile.query_residue,
              tile.head, batch, shared.query_full);
    queries.step();
    for (int n = count - 2; n >= 0; --n) {
      load_key(n);
      load_value(n + 1);
    }
    load_value(0);
  });
}

/// One warp hands every value tile on. 0 * NaN must reach nobody: it clears what lies beyond the
/// keys, and what is not finite where causal rows do not see it; rows that do get that back in the
/// end.
template <typename Element, int kHeadDim, bool kCausal>
__device__ inline void guard(ForwardShared<Element, kHeadDim>& shared) {
  using Tiles = ForwardTiles<kHeadDim>;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  Ring<Tiles::kStages> values;
  shared.tiles.read([&](Tile& tile, Ring<2>) {
    const int everyone_sees = tile.seen<kCausal>(tile.queries.first);
    const int someone_sees = tile.keys.last - tile.keys.first;
    for (int n = tile.keys.tiles(Tiles::kKeys) - 1; n >= 0; --n) {
      shared.value_full[values.stage].wait(values.parity);
      const int begin = everyone_sees - n * Tiles::kKeys;
      if (begin < Tiles::kKeys &&
          guard_rows<kCausal, true, Tiles::kKeys>(shared.value[values.stage], begin,
                                                  someone_sees - n * Tiles::kKeys, lane, 32)) {
        tile.has_bad_values = true;
      }
      arrive_warp(shared.value_clean[values.stage]);
      values.step();
    }
  });
}

/// One warp finds what a tile merges.
template <typename Element, int kHeadDim>
__device__ inline void find_parts(const ForwardArguments& arguments,
                                  ForwardShared<Element, kHeadDim>& shared) {
  const Call& call = arguments.call;
  shared.tiles.read([&](const Tile& tile, Ring<2> at) {
    const auto saved = saved_rows(arguments.branch_out, tile.batch, tile.head);
    const float2* const sums =
        arguments.branch_sums +
        (std::int64_t{tile.batch} * call.num_heads + tile.head) * call.branch_rows;
    shared.parts[at.stage].find(call, tile, tile.queries, [&](int rank, int row, auto slot) {
      shared.part_sums[at.stage][rank - 1][row] = sums[slot];
      prefetch_row(saved.row(slot), call.head_dim);
    });
  });
}

}  // namespace dilated::gpu::sm90
