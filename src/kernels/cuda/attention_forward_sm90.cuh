// Forward on Hopper (semantics §4). One tile of work is a block of query rows of one class of one
// (branch, sequence, segment, head); its keys pass by in tiles of 128:
//   S = Q K^T,  P = 2^(factor (S - max)),  O = shrink O + P V
// One warp looks up what tiles are, one loads by bulk tensor copies, one clears values that nobody
// may see; each other warpgroup owns 64 query rows and overlaps the product S of a tile with the
// softmax of that before. A branch writes partial results; or, a dense branch that is the first of
// the merge and whose rows are all rows, merges those of the others and writes O and the
// log-sum-exp (kMerges).
#pragma once

#include <algorithm>
#include <cstdint>

#include "src/kernels/cuda/attention_forward_sm90.h"
#include "src/kernels/cuda/device/element.cuh"
#include "src/kernels/cuda/device/launch.cuh"
#include "src/kernels/cuda/device/ptx.cuh"
#include "src/kernels/cuda/device/softmax.cuh"
#include "src/kernels/cuda/forward_tiles_sm90.cuh"
#include "src/kernels/cuda/products_sm90.cuh"
#include "src/merge.h"

namespace dilated::gpu::sm90 {

/// One warpgroup of 64 query rows.
template <typename Element, int kHeadDim, bool kCausal, bool kMerges>
class Consumer {
  using Tiles = ForwardTiles<kHeadDim>;
  using Shared = ForwardShared<Element, kHeadDim>;
  static constexpr int kScores = Tiles::kKeys / 2;

 public:
  __device__ Consumer(const ForwardArguments& arguments, Shared& shared)
      : arguments_(arguments),
        shared_(shared),
        thread_(static_cast<int>(threadIdx.x) % 128),
        first_row_(first_row_of_warpgroup()) {}

  __device__ void run() {
    shared_.tiles.read([this](const Tile& tile, Ring<2> at) {
      attend(tile);
      finish(tile, at);
    });
  }

 private:
  /// Row of the class that holds this thread's elements 4 j + 2 i.
  __device__ int row(const Tile& tile, int i) const {
    return tile.queries.first + first_row_ + thread_ / 32 * 16 + thread_ % 32 / 4 + 8 * i;
  }
  __device__ int seen(const Tile& tile, int row) const { return tile.template seen<kCausal>(row); }

  __device__ void score(float (&scores)[kScores]) {
    shared_.key_full[keys_.stage].wait(keys_.parity);
    multiply_rows<kHeadDim>(scores, shared_.query, first_row_, shared_.key[keys_.stage]);
  }

  __device__ void add_values(std::uint32_t (&probabilities)[kScores / 8][4], bool accumulate) {
    begin_products();
    pin(acc_);
    add_product(acc_, probabilities, shared_.value[values_.stage], accumulate);
    pin(acc_);
    commit_products();
  }

  /// Values on the diagonal that are not finite and that a row sees.
  __device__ void add_bad_values(const Tile& tile) {
    const auto values =
        rows_of(arguments_.value, tile.batch, tile.head / arguments_.call.heads_per_kv_head);
    const auto step = static_cast<int>(arguments_.call.branches[tile.branch].dilation);
#pragma unroll 1
    for (int key = tile.keys.first + max(0, seen(tile, tile.queries.first)); key < tile.keys.last;
         ++key) {
      add_bad_row<Element>(acc_,
                           values.row(std::int64_t{tile.key_row + key} * step + tile.key_residue),
                           arguments_.call.head_dim, key <= row(tile, 0), key <= row(tile, 1));
    }
  }

  template <bool kMasked>
  __device__ float2 softmax(const Tile& tile, float (&scores)[kScores], int n) {
    const float sign = arguments_.call.units.sign();
    if (sign != 1.0f) {
#pragma unroll
      for (int i = 0; i < kScores; ++i) {
        scores[i] *= sign;
      }
    }
    if constexpr (kMasked) {
      const int begin = n * Tiles::kKeys + thread_ % 4 * 2;
      const int ends[2] = {seen(tile, row(tile, 0)) - begin, seen(tile, row(tile, 1)) - begin};
#pragma unroll
      for (int i = 0; i < kScores; ++i) {
        scores[i] = i / 4 * 8 + i % 2 < ends[i / 2 % 2] ? scores[i] : kAbsentLse<float>;
      }
    }
    return tile_softmax<kMasked>(scores, sums_, arguments_.call.units.factor());
  }

  __device__ void attend(const Tile& tile) {
    float scores[kScores];
    std::uint32_t probabilities[kScores / 8][4];
    sums_ = RowSums{};
    const int count = tile.keys.tiles(Tiles::kKeys);
    if (count == 0) {
#pragma unroll
      for (float& sum : acc_) {
        sum = 0.0f;
      }
      return;
    }
    // Every row sees the key tiles below this one.
    const int plain = max(0, seen(tile, tile.queries.first)) / Tiles::kKeys;

    shared_.query_full.wait(queries_.parity);
    queries_.step();
    score(scores);
    wait_products<0>();
    pin(scores);
    arrive_warp(shared_.key_empty[keys_.stage]);
    keys_.step();
    softmax<true>(tile, scores, count - 1);
    pack_operands<Element>(scores, probabilities);

    const auto step = [&]<bool kMasked>(int n) {
      score(scores);
      shared_.value_clean[values_.stage].wait(values_.parity);
      add_values(probabilities, n < count - 2);
      wait_products<1>();
      pin(scores);
      arrive_warp(shared_.key_empty[keys_.stage]);
      keys_.step();
      const float2 shrink = softmax<kMasked>(tile, scores, n);
      wait_products<0>();
      pin(acc_);
      arrive_warp(shared_.value_empty[values_.stage]);
      values_.step();
#pragma unroll
      for (int i = 0; i < kHeadDim / 2; ++i) {
        acc_[i] *= i / 2 % 2 == 0 ? shrink.x : shrink.y;
      }
      pack_operands<Element>(scores, probabilities);
    };
    int n = count - 2;
    for (; n >= plain; --n) {
      step.template operator()<true>(n);
    }
    for (; n >= 0; --n) {
      step.template operator()<false>(n);
    }
    arrive_warp(shared_.query_empty);

    shared_.value_clean[values_.stage].wait(values_.parity);
    add_values(probabilities, count > 1);
    wait_products<0>();
    pin(acc_);
    arrive_warp(shared_.value_empty[values_.stage]);
    values_.step();
    if (kCausal && tile.has_bad_values) {
      add_bad_values(tile);
    }
  }

  __device__ void finish(const Tile& tile, Ring<2> at) {
    ScaledSum<float> totals[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float sum = quad_sum(sums_.sum[i]);
      // The largest of scores that are all NaN is not -inf.
      totals[i] = {isnan(sum) ? sum : sums_.max[i], sum};
      const float inverse = totals[i].max == kAbsentLse<float> ? 0.0f : 1.0f / sum;
#pragma unroll
      for (int j = 0; j < kHeadDim / 8; ++j) {
        acc_[4 * j + 2 * i] *= inverse;
        acc_[4 * j + 2 * i + 1] *= inverse;
      }
    }
    if constexpr (kMerges) {
      merge_others(tile, at, totals);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (row(tile, i) >= tile.queries.last) {
        continue;
      }
      if constexpr (kMerges) {
        write_result(tile, i);
      } else {
        write_partial(tile, i);
      }
    }
    // One thread of four per row.
    const int i = thread_ % 4;
    if (i < 2 && row(tile, i) < tile.queries.last) {
      write_sums(tile, row(tile, i), i == 0 ? totals[0] : totals[1]);
    }
  }

  __device__ void write_sums(const Tile& tile, int row, const ScaledSum<float>& total) {
    const ScoreUnits& units = arguments_.call.units;
    if constexpr (kMerges) {
      const LogSum sum = units.log_sum(total);
      const std::int64_t token = tile.token + row;
      item_at(arguments_.lse, tile.batch, tile.head, token) = sum.lse;
      if (arguments_.lse_residual.defined()) {
        item_at(arguments_.lse_residual, tile.batch, tile.head, token) = sum.residual;
      }
    } else {
      const std::int64_t slot = tile.saved + row;
      arguments_.branch_sums[sum_row(tile, slot)] = {total.max, total.sum};
      if (arguments_.branch_lse.defined()) {
        const LogSum sum = units.log_sum(total);
        float* const two = saved_rows(arguments_.branch_lse, tile.batch, tile.head).row(slot);
        two[0] = sum.lse;
        two[1] = sum.residual;
      }
    }
  }

  __device__ std::int64_t sum_row(const Tile& tile, std::int64_t slot) const {
    const Call& call = arguments_.call;
    return (std::int64_t{tile.batch} * call.num_heads + tile.head) * call.branch_rows + slot;
  }

  __device__ void write_partial(const Tile& tile, int i) {
    float* const out =
        saved_rows(arguments_.branch_out, tile.batch, tile.head).row(tile.saved + row(tile, i)) +
        thread_ % 4 * 2;
#pragma unroll
    for (int j = 0; j < kHeadDim / 8; ++j) {
      if (8 * j < arguments_.call.head_dim) {
        *reinterpret_cast<float2*>(out + 8 * j) = {acc_[4 * j + 2 * i], acc_[4 * j + 2 * i + 1]};
      }
    }
  }

  __device__ void merge_others(const Tile& tile, Ring<2> at, ScaledSum<float> (&totals)[2]) {
    const Call& call = arguments_.call;
    const auto saved = saved_rows(arguments_.branch_out, tile.batch, tile.head);
    const int row = this->row(tile, 0) - tile.queries.first;
    shared_.parts[at.stage].found.wait(at.parity);
#pragma unroll 1
    for (int rank = 1; rank < call.num_branches; ++rank) {
      // Both rows are under way at once.
      bool covers[2];
      float2 others[2][kHeadDim / 8];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int slot = shared_.parts[at.stage].slot[rank - 1][row + 8 * i];
        covers[i] = slot >= 0;
        const float* const part = saved.row(max(0, slot)) + thread_ % 4 * 2;
#pragma unroll
        for (int j = 0; j < kHeadDim / 8; ++j) {
          others[i][j] = covers[i] && 8 * j < call.head_dim
                             ? *reinterpret_cast<const float2*>(part + 8 * j)
                             : float2{0.0f, 0.0f};
        }
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (covers[i]) {
          const float2 sums = shared_.part_sums[at.stage][rank - 1][row + 8 * i];
          const auto merged = merge_sums(totals[i], ScaledSum<float>{sums.x, sums.y},
                                         [&](float x) { return call.units.power(x); });
          totals[i] = merged.total;
#pragma unroll
          for (int j = 0; j < kHeadDim / 8; ++j) {
            float* const own = acc_ + 4 * j + 2 * i;
            own[0] = merged_value(merged, own[0], others[i][j].x);
            own[1] = merged_value(merged, own[1], others[i][j].y);
          }
        }
      }
    }
  }

  __device__ void write_result(const Tile& tile, int i) {
    std::byte* const out =
        rows_of(arguments_.out, tile.batch, tile.head).row(tile.token + row(tile, i));
    const bool rounds = arguments_.out.dtype != DType::kFloat32;
#pragma unroll
    for (int j = 0; j < kHeadDim / 8; ++j) {
      if (8 * j >= arguments_.call.head_dim) {
        continue;
      }
      const float x = arguments_.call.out_scale * acc_[4 * j + 2 * i];
      const float y = arguments_.call.out_scale * acc_[4 * j + 2 * i + 1];
      const int column = 8 * j + thread_ % 4 * 2;
      if (rounds) {
        reinterpret_cast<std::uint32_t*>(out)[column / 2] = pack<Element>(x, y);
      } else {
        reinterpret_cast<float2*>(out)[column / 2] = {x, y};
      }
    }
  }

  const ForwardArguments& arguments_;
  Shared& shared_;
  const int thread_;     // of the warpgroup
  const int first_row_;  // of the warpgroup in the tile
  Ring<Tiles::kStages> keys_, values_;
  Ring<1> queries_;
  RowSums sums_;
  float acc_[kHeadDim / 2];
};

template <typename Element, int kHeadDim, bool kCausal, bool kMerges>
__global__ void __launch_bounds__(ForwardTiles<kHeadDim>::kThreads, 1)
    forward_kernel(const __grid_constant__ ForwardArguments arguments) {
  using Tiles = ForwardTiles<kHeadDim>;
  using Shared = ForwardShared<Element, kHeadDim>;
  extern __shared__ __align__(1024) unsigned char memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  if (threadIdx.x == 0) {
    constexpr std::uint32_t kWarps = 4 * Tiles::kWarpgroups;
    shared.query_full.init(1);
    shared.query_empty.init(kWarps);
    for (int i = 0; i < Tiles::kStages; ++i) {
      shared.key_full[i].init(1);
      shared.key_empty[i].init(kWarps);
      shared.value_full[i].init(1);
      shared.value_clean[i].init(1);
      shared.value_empty[i].init(kWarps);
    }
    // And the producer, the guard, who finds parts.
    shared.tiles.init(kWarps + (kMerges ? 3 : 2));
    shared.parts[0].found.init(1);
    shared.parts[1].found.init(1);
    fence_barrier_init();
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    give_registers<Tiles::kProducerRegisters>();
    if (threadIdx.x == 0) {
      produce(arguments, shared);
    } else if (threadIdx.x == 32) {
      shared.tiles.write(arguments.range, [&](std::int64_t index, Tile& tile) {
        return find_tile<kCausal, Tiles::kRows, true>(arguments.call, arguments.range, index, tile);
      });
    } else if (threadIdx.x / 32 == 2) {
      guard<Element, kHeadDim, kCausal>(shared);
    } else if (kMerges && threadIdx.x / 32 == 3) {
      find_parts(arguments, shared);
    }
  } else {
    take_registers<Tiles::kConsumerRegisters>();
    Consumer<Element, kHeadDim, kCausal, kMerges>(arguments, shared).run();
  }
}

template <typename Element, int kHeadDim, bool kCausal, bool kMerges>
void launch_forward(const ForwardArguments& arguments, cudaStream_t stream) {
  launch(forward_kernel<Element, kHeadDim, kCausal, kMerges>,
         {std::min<std::int64_t>(arguments.range.num_tiles, count_multiprocessors())},
         ForwardTiles<kHeadDim>::kThreads, sizeof(ForwardShared<Element, kHeadDim>), stream,
         arguments, "forward");
}

/// One launch for one dtype; each is a file of its own, so that they compile side by side.
template <typename Element>
void run_forward(const ForwardArguments& arguments, bool merges, cudaStream_t stream) {
  const auto run = [&]<int kHeadDim>() {
    const auto launches = arguments.call.is_causal
                              ? (merges ? launch_forward<Element, kHeadDim, true, true>
                                        : launch_forward<Element, kHeadDim, true, false>)
                              : (merges ? launch_forward<Element, kHeadDim, false, true>
                                        : launch_forward<Element, kHeadDim, false, false>);
    launches(arguments, stream);
  };
  for_head_dim(arguments.call.head_dim, run);
}

extern template void run_forward<__nv_bfloat16>(const ForwardArguments&, bool, cudaStream_t);
extern template void run_forward<__half>(const ForwardArguments&, bool, cudaStream_t);

}  // namespace dilated::gpu::sm90
