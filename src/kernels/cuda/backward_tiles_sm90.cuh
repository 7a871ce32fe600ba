// What tiles of backward on Hopper need, who loads them and who guards them
// (attention_backward_sm90.cuh).
#pragma once

#include <cstdint>

#include "src/kernels/cuda/attention_backward_sm90.h"
#include "src/kernels/cuda/tiles_sm90.cuh"

namespace dilated::gpu::sm90 {

struct BackwardMaps {
  DilatedMaps query, dout, key, value;
};

struct GradientArguments;

/// A result and what other branches give to it. Sparse branches that run before a dense one, which
/// writes the result, leave float32 rows like branch results; else every branch adds to float32
/// sums.
struct Gradient {
  TensorView result;
  float* parts;  // (batch, heads, part_rows, head_dim), unscaled; or null: `result` is the sums
  std::int64_t heads;
  float scale;

  __device__ float* part(const GradientArguments& arguments, std::int64_t batch, int head,
                         std::int64_t slot) const;
};

/// Of one branch, or of all but the dense one.
struct GradientArguments {
  Call call;
  BackwardMaps maps[kMostBranches];  // by number of the branch
  TileRange range;
  const RowNumbers* row_numbers;     // (batch, heads, branch_rows)
  ConstTensorView query, dout, key;  // for what is not finite
  bool merges;                       // the dense branch after the others
  std::int64_t part_rows;
  Gradient dquery, dkey, dvalue;
};

__device__ inline float* Gradient::part(const GradientArguments& arguments, std::int64_t batch,
                                        int head, std::int64_t slot) const {
  return parts + ((batch * heads + head) * arguments.part_rows + slot) * arguments.call.head_dim;
}

/// Two warpgroups own 64 rows each of what stays; another loads, looks up and guards.
struct BackwardThreads {
  static constexpr int kRows = kBackwardRows;
  static constexpr int kWarpgroups = kRows / 64;
  static constexpr int kThreads = 128 * (kWarpgroups + 1);
  static constexpr int kConsumerThreads = 128 * kWarpgroups;
  static constexpr int kProducerRegisters = 24;
  static constexpr int kConsumerRegisters = 240;
};

/// Query rows stay, keys pass by.
template <typename Element, int kHeadDim>
struct alignas(1024) QueryGradientShared : BackwardThreads {
  static constexpr int kPanels = count_panels(kHeadDim);
  static constexpr int kKeys = 128;
  static constexpr int kStages = 2;
  using Staying = Element[kPanels][kRows * kPanelColumns];
  using Passing = Element[kPanels][kKeys * kPanelColumns];

  Staying query, dout;
  Passing key[kStages], value[kStages];
  Barrier staying_full, staying_empty;
  Barrier key_full[kStages], key_clean[kStages], key_empty[kStages];
  Barrier value_full[kStages], value_empty[kStages];
  TileQueue tiles;
  PartSlots<kRows> parts[2];  // by place in the queue
  bool key_is_bad[kStages];

  __device__ void init(bool merges) {
    constexpr std::uint32_t kWarps = 4 * kWarpgroups;
    staying_full.init(1);
    staying_empty.init(kWarps);
    for (int i = 0; i < kStages; ++i) {
      key_full[i].init(1);
      key_clean[i].init(1);
      key_empty[i].init(kWarps);
      value_full[i].init(1);
      value_empty[i].init(kWarps);
      key_is_bad[i] = false;
    }
    // And the producer, the guard, who finds parts.
    tiles.init(kWarps + (merges ? 3 : 2));
    parts[0].found.init(1);
    parts[1].found.init(1);
  }

  __device__ void produce(const GradientArguments& arguments) {
    Ring<1> stay;
    Ring<kStages> pass;
    tiles.template read<true>([&](const Tile& tile, Ring<2>) {
      const BackwardMaps& maps = arguments.maps[tile.branch];
      const int count = tile.keys.tiles(kKeys);
      const int kv_head = tile.head / arguments.call.heads_per_kv_head;
      const int first = tile.key_row + tile.keys.first;
      for (int n = count - 1; n >= 0; --n) {
        key_empty[pass.stage].wait(pass.parity ^ 1);
        key_full[pass.stage].arrive_and_expect(sizeof(Passing));
        load_rows(key[pass.stage], maps.key, first + n * kKeys, tile.key_residue, kv_head,
                  tile.batch, key_full[pass.stage]);
        if (n == count - 1) {
          staying_empty.wait(stay.parity ^ 1);
          staying_full.arrive_and_expect(2 * sizeof(Staying));
          const int row = tile.query_row + tile.queries.first;
          load_rows(query, maps.query, row, tile.query_residue, tile.head, tile.batch,
                    staying_full);
          load_rows(dout, maps.dout, row, tile.query_residue, tile.head, tile.batch, staying_full);
          stay.step();
        }
        value_empty[pass.stage].wait(pass.parity ^ 1);
        value_full[pass.stage].arrive_and_expect(sizeof(Passing));
        load_rows(value[pass.stage], maps.value, first + n * kKeys, tile.key_residue, kv_head,
                  tile.batch, value_full[pass.stage]);
        pass.step();
      }
    });
  }

  /// Keys are summed over: what lies beyond them is cleared. What is not finite is only found here,
  /// scores need it.
  template <bool kCausal>
  __device__ void guard(const GradientArguments&) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    Ring<kStages> pass;
    tiles.read([&](Tile& tile, Ring<2>) {
      const int everyone_sees = tile.seen<kCausal>(tile.queries.first);
      const int someone_sees = tile.keys.last - tile.keys.first;
      for (int n = tile.keys.tiles(kKeys) - 1; n >= 0; --n) {
        key_full[pass.stage].wait(pass.parity);
        const int begin = everyone_sees - n * kKeys;
        if (begin < kKeys) {
          const bool is_bad = guard_rows<kCausal, false, kKeys>(key[pass.stage], begin,
                                                                someone_sees - n * kKeys, lane, 32);
          if (kCausal) {
            key_is_bad[pass.stage] = __any_sync(0xFFFFFFFFu, is_bad);
            tile.has_bad_values |= key_is_bad[pass.stage];
          }
        }
        arrive_warp(key_clean[pass.stage]);
        pass.step();
      }
    });
  }

  __device__ void find_parts(const GradientArguments& arguments) {
    tiles.read([&](const Tile& tile, Ring<2> at) {
      parts[at.stage].find(arguments.call, tile, tile.queries, [&](int, int, auto slot) {
        prefetch_row(arguments.dquery.part(arguments, tile.batch, tile.head, slot),
                     arguments.call.head_dim);
      });
    });
  }
};

/// Key rows stay, queries of all heads that share them pass by.
template <typename Element, int kHeadDim>
struct alignas(1024) KeyGradientShared : BackwardThreads {
  static constexpr int kPanels = count_panels(kHeadDim);
  static constexpr int kQueries = key_gradient_queries(kHeadDim);
  static constexpr int kStages = 2;
  using Staying = Element[kPanels][kRows * kPanelColumns];
  using Passing = Element[kPanels][kQueries * kPanelColumns];

  Staying key, value;
  Passing query[kStages], dout[kStages];
  alignas(16) float base[kStages][kQueries];
  alignas(16) float residual[kStages][kQueries];
  alignas(16) float delta[kStages][kQueries];
  Barrier staying_full, staying_empty;
  Barrier full[kStages], clean[kStages], empty[kStages];
  TileQueue tiles;
  PartSlots<kRows> parts[2];  // by place in the queue
  bool is_bad[kStages];

  __device__ void init(bool merges) {
    constexpr std::uint32_t kWarps = 4 * kWarpgroups;
    staying_full.init(1);
    staying_empty.init(kWarps);
    for (int i = 0; i < kStages; ++i) {
      full[i].init(1);
      clean[i].init(1);
      empty[i].init(kWarps);
      is_bad[i] = false;
    }
    // And the producer, the guard, who finds parts.
    tiles.init(kWarps + (merges ? 3 : 2));
    parts[0].found.init(1);
    parts[1].found.init(1);
  }

  /// A tile belongs to the first head of those that share its rows.
  __device__ static bool is_first_head(const Call& call, const Tile& tile) {
    const std::int64_t* const offsets = call.offsets + std::int64_t{tile.branch} * call.num_heads;
    int head = tile.head / call.heads_per_kv_head * call.heads_per_kv_head;
    while (offsets[head] != offsets[tile.head]) {
      ++head;
    }
    return head == tile.head;
  }

  /// Every block of queries of every head whose rows see the tile's keys.
  template <typename Work>
  __device__ static void for_each_block(const Call& call, const Tile& tile, const Work& work) {
    const std::int64_t* const offsets = call.offsets + std::int64_t{tile.branch} * call.num_heads;
    const int end = (tile.head / call.heads_per_kv_head + 1) * call.heads_per_kv_head;
    for (int head = tile.head; head < end; ++head) {
      if (head == tile.head || offsets[head] == offsets[tile.head]) {
        for (int q = tile.queries.first; q < tile.queries.last; q += kQueries) {
          work(head, q);
        }
      }
    }
  }

  __device__ void produce(const GradientArguments& arguments) {
    Ring<1> stay;
    Ring<kStages> pass;
    tiles.template read<true>([&](const Tile& tile, Ring<2>) {
      const BackwardMaps& maps = arguments.maps[tile.branch];
      const int kv_head = tile.head / arguments.call.heads_per_kv_head;
      staying_empty.wait(stay.parity ^ 1);
      staying_full.arrive_and_expect(2 * sizeof(Staying));
      const int row = tile.key_row + tile.keys.first;
      load_rows(key, maps.key, row, tile.key_residue, kv_head, tile.batch, staying_full);
      load_rows(value, maps.value, row, tile.key_residue, kv_head, tile.batch, staying_full);
      stay.step();
      for_each_block(arguments.call, tile, [&](int head, int q) {
        empty[pass.stage].wait(pass.parity ^ 1);
        full[pass.stage].arrive_and_expect(2 * sizeof(Passing));
        load_rows(query[pass.stage], maps.query, tile.query_row + q, tile.query_residue, head,
                  tile.batch, full[pass.stage]);
        load_rows(dout[pass.stage], maps.dout, tile.query_row + q, tile.query_residue, head,
                  tile.batch, full[pass.stage]);
        pass.step();
      });
    });
  }

  /// One warp loads row numbers and guards by them: rows beyond the queries contribute nothing and
  /// are cleared, since queries and dO are summed over; a query or a dO that is not finite has
  /// numbers that are not.
  template <bool>
  __device__ void guard(const GradientArguments& arguments) {
    const Call& call = arguments.call;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    Ring<kStages> pass;
    tiles.read([&](Tile& tile, Ring<2>) {
      for_each_block(call, tile, [&](int head, int q) {
        const RowNumbers* const numbers =
            arguments.row_numbers +
            (std::int64_t{tile.batch} * call.num_heads + head) * call.branch_rows + tile.saved + q;
        RowNumbers own[kQueries / 32];
        bool bad = false;
#pragma unroll
        for (int i = 0; i < kQueries / 32; ++i) {
          const int at = 32 * i + lane;
          own[i] =
              q + at < tile.queries.last ? numbers[at] : RowNumbers{INFINITY, 0.0f, 0.0f, 0.0f};
          bad |= q + at < tile.queries.last &&
                 !(isfinite(own[i].base) && isfinite(own[i].residual) && isfinite(own[i].delta));
        }
        bad = __any_sync(0xFFFFFFFFu, bad);
        empty[pass.stage].wait(pass.parity ^ 1);
#pragma unroll
        for (int i = 0; i < kQueries / 32; ++i) {
          base[pass.stage][32 * i + lane] = own[i].base;
          residual[pass.stage][32 * i + lane] = own[i].residual;
          delta[pass.stage][32 * i + lane] = own[i].delta;
        }
        if (bad) {
          tile.has_bad_values = true;
        }
        is_bad[pass.stage] = bad;
        if (q + kQueries > tile.queries.last) {
          full[pass.stage].wait(pass.parity);
          const int end = tile.queries.last - q;
          guard_rows<false, false, kQueries>(query[pass.stage], end, end, lane, 32);
          guard_rows<false, false, kQueries>(dout[pass.stage], end, end, lane, 32);
        }
        arrive_warp(clean[pass.stage]);
        pass.step();
      });
    });
  }

  __device__ void find_parts(const GradientArguments& arguments) {
    tiles.read([&](const Tile& tile, Ring<2> at) {
      const int kv_head = tile.head / arguments.call.heads_per_kv_head;
      parts[at.stage].find(arguments.call, tile, tile.keys, [&](int, int, auto slot) {
        for (const Gradient* const gradient : {&arguments.dkey, &arguments.dvalue}) {
          prefetch_row(gradient->part(arguments, tile.batch, kv_head, slot),
                       arguments.call.head_dim);
        }
      });
    });
  }
};

}  // namespace dilated::gpu::sm90
