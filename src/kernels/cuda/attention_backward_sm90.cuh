// Backward on Hopper (semantics §6; docs/architecture.md, "Backward in one form"), without atomics,
// in seven products instead of five: every gradient row has one block per branch that sums it in
// order.
//   query rows stay:  S = Q K^T      dP = dO V^T      dQ += dS K
//   key rows stay:    S^T = K Q^T    dP^T = V dO^T    dV += P^T dO     dK += dS^T Q
// Two warpgroups own 64 rows each of what stays, so that one multiplies while the other computes
// probabilities; warps of a third look up, load and guard (backward_tiles_sm90.cuh).
#pragma once

#include <algorithm>
#include <cstdint>

#include "src/kernels/cuda/backward_tiles_sm90.cuh"
#include "src/kernels/cuda/device/launch.cuh"
#include "src/kernels/cuda/device/softmax.cuh"
#include "src/kernels/cuda/products_sm90.cuh"

namespace dilated::gpu::sm90 {

/// P = 2^(f (S - base) - residual). Product and difference are rounded one by one, as in the
/// residual itself.
__device__ inline float probability(float score, const ScoreUnits& units, float base,
                                    float residual) {
  return exp2_unit(
      __fsub_rn(__fmul_rn(units.factor(), fmaf(units.sign(), score, -base)), residual));
}

/// Adds a row's sums, of the accumulator layout, to memory.
template <int kCount>
__device__ inline void add_row(const float (&sums)[kCount], int half, float scale, int columns,
                               std::byte* to) {
  float* const row = reinterpret_cast<float*>(to) + threadIdx.x % 4 * 2;
#pragma unroll
  for (int j = 0; j < kCount / 4; ++j) {
    if (8 * j < columns) {
      float2& pair = *reinterpret_cast<float2*>(row + 8 * j);
      pair = {fmaf(scale, sums[4 * j + 2 * half], pair.x),
              fmaf(scale, sums[4 * j + 2 * half + 1], pair.y)};
    }
  }
}

/// Writes the sums of this thread's two rows: see Gradient. `row` counts in the tile; `token` is
/// that of row 0 of the class.
template <typename Element, int kCount, int kRows>
__device__ inline void write_rows(const GradientArguments& arguments, const Gradient& gradient,
                                  const Tile& tile, const TileRows& rows, int row,
                                  std::int64_t token, int head, PartSlots<kRows>& parts,
                                  std::uint32_t parity, float (&sums)[kCount]) {
  const Call& call = arguments.call;
  const int column = threadIdx.x % 4 * 2;
  const auto result = rows_of(gradient.result, tile.batch, head);
  const std::int64_t dilation = call.branches[tile.branch].dilation;
  if (arguments.merges) {
    parts.found.wait(parity);
#pragma unroll 1
    for (int rank = 1; rank < call.num_branches; ++rank) {
      // Both rows are under way at once.
      float2 others[2][kCount / 4];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int slot = parts.slot[rank - 1][row + 8 * half];
        const float* const part = gradient.part(arguments, tile.batch, head, max(0, slot)) + column;
#pragma unroll
        for (int j = 0; j < kCount / 4; ++j) {
          others[half][j] = slot >= 0 && 8 * j < call.head_dim
                                ? *reinterpret_cast<const float2*>(part + 8 * j)
                                : float2{0.0f, 0.0f};
        }
      }
#pragma unroll
      for (int i = 0; i < kCount; i += 2) {
        sums[i] += others[i / 2 % 2][i / 4].x;
        sums[i + 1] += others[i / 2 % 2][i / 4].y;
      }
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int at = rows.first + row + 8 * half;
    if (at >= rows.last) {
      continue;
    }
    std::byte* const to = result.row(token + at * dilation);
    if (gradient.parts == nullptr) {
      add_row(sums, half, gradient.scale, call.head_dim, to);
    } else if (arguments.merges) {
#pragma unroll
      for (int j = 0; j < kCount / 4; ++j) {
        if (8 * j < call.head_dim) {
          reinterpret_cast<std::uint32_t*>(to)[(8 * j + column) / 2] = pack<Element>(
              gradient.scale * sums[4 * j + 2 * half], gradient.scale * sums[4 * j + 2 * half + 1]);
        }
      }
    } else {
      float* const part = gradient.part(arguments, tile.batch, head, tile.saved + at);
#pragma unroll
      for (int j = 0; j < kCount / 4; ++j) {
        if (8 * j < call.head_dim) {
          *reinterpret_cast<float2*>(part + 8 * j + column) = {sums[4 * j + 2 * half],
                                                               sums[4 * j + 2 * half + 1]};
        }
      }
    }
  }
}

/// One warpgroup of 64 query rows.
template <typename Element, int kHeadDim, bool kCausal>
class QueryGradient {
 public:
  using Shared = QueryGradientShared<Element, kHeadDim>;
  static constexpr bool kIsCausal = kCausal;

  __device__ static bool find(const GradientArguments& arguments, std::int64_t index, Tile& tile) {
    return find_tile<kCausal, Shared::kRows, true>(arguments.call, arguments.range, index, tile) &&
           tile.keys.first < tile.keys.last;
  }

  __device__ QueryGradient(const GradientArguments& arguments, Shared& shared)
      : arguments_(arguments),
        shared_(shared),
        lane_(static_cast<int>(threadIdx.x) % 32),
        first_row_(first_row_of_warpgroup()),
        row_(static_cast<int>(threadIdx.x) / 32 * 16 - 64 + lane_ / 4) {}

  __device__ void run() {
    shared_.tiles.read([this](const Tile& tile, Ring<2> at) {
      const int count = tile.keys.tiles(kKeys);
      load_numbers(tile);
      // Every row sees the key tiles below this one.
      const int plain = max(0, tile.template seen<kCausal>(tile.queries.first)) / kKeys;
      shared_.staying_full.wait(stay_.parity);
      stay_.step();
      int n = count - 1;
      for (; n >= plain; --n) {
        step<true>(tile, n, n < count - 1);
      }
      for (; n >= 0; --n) {
        step<false>(tile, n, n < count - 1);
      }
      if (kCausal && tile.has_bad_values) {
        add_bad_values(tile);
      }
      write_rows<Element>(arguments_, arguments_.dquery, tile, tile.queries, row_, tile.token,
                          tile.head, shared_.parts[at.stage], at.parity, acc_);
    });
  }

 private:
  static constexpr int kKeys = Shared::kKeys;
  static constexpr int kScores = kKeys / 2;

  __device__ void load_numbers(const Tile& tile) {
    const Call& call = arguments_.call;
    const RowNumbers* const numbers =
        arguments_.row_numbers +
        (std::int64_t{tile.batch} * call.num_heads + tile.head) * call.branch_rows + tile.saved;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = tile.queries.first + row_ + 8 * half;
      numbers_[half] =
          row < tile.queries.last ? numbers[row] : RowNumbers{INFINITY, 0.0f, 0.0f, 0.0f};
    }
  }

  /// Keys on the diagonal that are not finite and that a row sees.
  __device__ void add_bad_values(const Tile& tile) {
    const auto keys =
        rows_of(arguments_.key, tile.batch, tile.head / arguments_.call.heads_per_kv_head);
    const std::int64_t dilation = arguments_.call.branches[tile.branch].dilation;
    const int row = tile.queries.first + row_;
#pragma unroll 1
    for (int key = tile.keys.first + max(0, tile.template seen<kCausal>(tile.queries.first));
         key < tile.keys.last; ++key) {
      add_bad_row<Element>(acc_, keys.row((tile.key_row + key) * dilation + tile.key_residue),
                           arguments_.call.head_dim, key <= row, key <= row + 8);
    }
  }

  template <bool kMasked>
  __device__ void step(const Tile& tile, int n, bool accumulate) {
    const int stage = pass_.stage;
    float scores[kScores];
    float dscores[kScores];
    shared_.key_full[stage].wait(pass_.parity);
    multiply_rows<kHeadDim>(scores, shared_.query, first_row_, shared_.key[stage]);
    shared_.value_full[stage].wait(pass_.parity);
    multiply_rows<kHeadDim>(dscores, shared_.dout, first_row_, shared_.value[stage]);
    wait_products<1>();
    pin(scores);
    const Call& call = arguments_.call;
#pragma unroll
    for (int i = 0; i < kScores; ++i) {
      const RowNumbers& row = numbers_[i / 2 % 2];
      scores[i] = probability(scores[i], call.units, row.base, row.residual);
    }
    wait_products<0>();
    pin(dscores);
    arrive_warp(shared_.value_empty[stage]);
    if (n == 0) {
      arrive_warp(shared_.staying_empty);
    }
#pragma unroll
    for (int i = 0; i < kScores; ++i) {
      dscores[i] = scores[i] * fmaf(call.out_scale, dscores[i], -numbers_[i / 2 % 2].delta);
    }
    if constexpr (kMasked) {
      const int begin = n * kKeys + lane_ % 4 * 2;
      const int row = tile.queries.first + row_;
      const int ends[2] = {tile.template seen<kCausal>(row) - begin,
                           tile.template seen<kCausal>(row + 8) - begin};
#pragma unroll
      for (int i = 0; i < kScores; ++i) {
        dscores[i] = i / 4 * 8 + i % 2 < ends[i / 2 % 2] ? dscores[i] : 0.0f;
      }
    }
    std::uint32_t operands[kScores / 8][4];
    pack_operands<Element>(dscores, operands);
    shared_.key_clean[stage].wait(pass_.parity);
    if (kMasked && kCausal && shared_.key_is_bad[stage]) {
      // Rows that see what is not finite have it in their scores; others must not have 0 * NaN.
      named_barrier(1, Shared::kConsumerThreads);
      guard_rows<true, true, kKeys>(shared_.key[stage], 0, kKeys,
                                    static_cast<int>(threadIdx.x) - 128, Shared::kConsumerThreads);
      named_barrier(1, Shared::kConsumerThreads);
    }
    begin_products();
    pin(acc_);
    add_product(acc_, operands, shared_.key[stage], accumulate);
    pin(acc_);
    commit_products();
    wait_products<0>();
    pin(acc_);
    arrive_warp(shared_.key_empty[stage]);
    pass_.step();
  }

  const GradientArguments& arguments_;
  Shared& shared_;
  const int lane_;
  const int first_row_;  // of the warpgroup in the tile
  const int row_;        // of this thread in the tile, and 8 below
  Ring<1> stay_;
  Ring<Shared::kStages> pass_;
  RowNumbers numbers_[2];
  float acc_[kHeadDim / 2];
};

/// One warpgroup of 64 key rows.
template <typename Element, int kHeadDim, bool kCausal>
class KeyGradient {
 public:
  using Shared = KeyGradientShared<Element, kHeadDim>;
  static constexpr bool kIsCausal = kCausal;

  __device__ static bool find(const GradientArguments& arguments, std::int64_t index, Tile& tile) {
    return find_tile<kCausal, Shared::kRows, false>(arguments.call, arguments.range, index, tile) &&
           tile.queries.first < tile.queries.last && Shared::is_first_head(arguments.call, tile);
  }

  __device__ KeyGradient(const GradientArguments& arguments, Shared& shared)
      : arguments_(arguments),
        shared_(shared),
        lane_(static_cast<int>(threadIdx.x) % 32),
        first_row_(first_row_of_warpgroup()),
        row_(static_cast<int>(threadIdx.x) / 32 * 16 - 64 + lane_ / 4) {}

  __device__ void run() {
    shared_.tiles.read([this](const Tile& tile, Ring<2> at) {
      shared_.staying_full.wait(stay_.parity);
      stay_.step();
      bool accumulate = false;
      shared_.for_each_block(arguments_.call, tile, [&](int, int q) {
        step(tile, q, accumulate);
        accumulate = true;
      });
      arrive_warp(shared_.staying_empty);
      if (kCausal && tile.has_bad_values) {
        add_bad_values(tile);
      }
      const std::int64_t dilation = arguments_.call.branches[tile.branch].dilation;
      const std::int64_t token = tile.key_row * dilation + tile.key_residue;
      const int kv_head = tile.head / arguments_.call.heads_per_kv_head;
      write_rows<Element>(arguments_, arguments_.dkey, tile, tile.keys, row_, token, kv_head,
                          shared_.parts[at.stage], at.parity, dkey_);
      write_rows<Element>(arguments_, arguments_.dvalue, tile, tile.keys, row_, token, kv_head,
                          shared_.parts[at.stage], at.parity, dvalue_);
    });
  }

 private:
  static constexpr int kQueries = Shared::kQueries;
  static constexpr int kScores = kQueries / 2;

  __device__ void step(const Tile& tile, int q, bool accumulate) {
    const int stage = pass_.stage;
    float scores[kScores];
    float dscores[kScores];
    shared_.full[stage].wait(pass_.parity);
    shared_.clean[stage].wait(pass_.parity);
    multiply_rows<kHeadDim>(scores, shared_.key, first_row_, shared_.query[stage]);
    multiply_rows<kHeadDim>(dscores, shared_.value, first_row_, shared_.dout[stage]);
    wait_products<1>();
    pin(scores);
    const Call& call = arguments_.call;
    const int pair = lane_ % 4 * 2;
#pragma unroll
    for (int j = 0; j < kScores / 4; ++j) {
      const auto base = reinterpret_cast<const float2&>(shared_.base[stage][8 * j + pair]);
      const auto residual = reinterpret_cast<const float2&>(shared_.residual[stage][8 * j + pair]);
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        scores[4 * j + i] = probability(scores[4 * j + i], call.units, base.x, residual.x);
        scores[4 * j + i + 1] = probability(scores[4 * j + i + 1], call.units, base.y, residual.y);
      }
    }
    wait_products<0>();
    pin(dscores);
#pragma unroll
    for (int j = 0; j < kScores / 4; ++j) {
      const auto delta = reinterpret_cast<const float2&>(shared_.delta[stage][8 * j + pair]);
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        float* const ds = dscores + 4 * j + i;
        ds[0] = scores[4 * j + i] * fmaf(call.out_scale, ds[0], -delta.x);
        ds[1] = scores[4 * j + i + 1] * fmaf(call.out_scale, ds[1], -delta.y);
      }
    }
    const bool on_diagonal = kCausal && q < tile.keys.last - 1;
    if (on_diagonal) {
      const int unseen = tile.keys.first + row_ - q - pair;  // the first query that sees this row
#pragma unroll
      for (int i = 0; i < kScores; ++i) {
        const bool sees = i / 4 * 8 + i % 2 >= unseen + i / 2 % 2 * 8;
        scores[i] = sees ? scores[i] : 0.0f;
        dscores[i] = sees ? dscores[i] : 0.0f;
      }
    }
    std::uint32_t probabilities[kScores / 8][4];
    std::uint32_t operands[kScores / 8][4];
    pack_operands<Element>(scores, probabilities);
    pack_operands<Element>(dscores, operands);
    if (on_diagonal && shared_.is_bad[stage]) {
      // As for keys in QueryGradient; dV gets back what its rows see of dO.
      named_barrier(1, Shared::kConsumerThreads);
      const int thread = static_cast<int>(threadIdx.x) - 128;
      guard_rows<true, true, kQueries>(shared_.query[stage], 0, kQueries, thread,
                                       Shared::kConsumerThreads);
      guard_rows<true, true, kQueries>(shared_.dout[stage], 0, kQueries, thread,
                                       Shared::kConsumerThreads);
      named_barrier(1, Shared::kConsumerThreads);
    }
    begin_products();
    pin(dvalue_);
    add_product(dvalue_, probabilities, shared_.dout[stage], accumulate);
    pin(dvalue_);
    pin(dkey_);
    add_product(dkey_, operands, shared_.query[stage], accumulate);
    pin(dkey_);
    commit_products();
    wait_products<0>();
    pin(dvalue_);
    pin(dkey_);
    arrive_warp(shared_.empty[stage]);
    pass_.step();
  }

  /// Queries and dO of blocks on the diagonal that are not finite and that a row sees.
  __device__ void add_bad_values(const Tile& tile) {
    const std::int64_t dilation = arguments_.call.branches[tile.branch].dilation;
    const int row = tile.keys.first + row_;
    shared_.for_each_block(arguments_.call, tile, [&](int head, int q) {
      const auto queries = rows_of(arguments_.query, tile.batch, head);
      const auto douts = rows_of(arguments_.dout, tile.batch, head);
      const int end = q < tile.keys.last - 1 ? min(q + kQueries, tile.queries.last) : q;
#pragma unroll 1
      for (int query = q; query < end; ++query) {
        const std::int64_t token = tile.token + query * dilation;
        add_bad_row<Element>(dkey_, queries.row(token), arguments_.call.head_dim, query >= row,
                             query >= row + 8);
        add_bad_row<Element>(dvalue_, douts.row(token), arguments_.call.head_dim, query >= row,
                             query >= row + 8);
      }
    });
  }

  const GradientArguments& arguments_;
  Shared& shared_;
  const int lane_;
  const int first_row_;
  const int row_;
  Ring<1> stay_;
  Ring<Shared::kStages> pass_;
  float dkey_[kHeadDim / 2];
  float dvalue_[kHeadDim / 2];
};

/// Consumer: QueryGradient or KeyGradient.
template <typename Consumer>
__global__ void __launch_bounds__(BackwardThreads::kThreads, 1)
    gradient_kernel(const __grid_constant__ GradientArguments arguments) {
  using Shared = typename Consumer::Shared;
  extern __shared__ __align__(1024) unsigned char memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  if (threadIdx.x == 0) {
    shared.init(arguments.merges);
    fence_barrier_init();
  }
  __syncthreads();
  const int warp = static_cast<int>(threadIdx.x) / 32;
  if (warp < 4) {
    give_registers<Shared::kProducerRegisters>();
    if (threadIdx.x == 0) {
      shared.produce(arguments);
    } else if (threadIdx.x == 32) {
      shared.tiles.write(arguments.range, [&](std::int64_t index, Tile& tile) {
        return Consumer::find(arguments, index, tile);
      });
    } else if (warp == 2) {
      shared.template guard<Consumer::kIsCausal>(arguments);
    } else if (warp == 3 && arguments.merges) {
      shared.find_parts(arguments);
    }
  } else {
    take_registers<Shared::kConsumerRegisters>();
    Consumer(arguments, shared).run();
  }
}

/// One launch for one dtype; each dtype is a file of its own, so that they compile side by side.
template <template <typename, int, bool> typename Consumer, typename Element>
void run_gradient(const GradientArguments& arguments, cudaStream_t stream) {
  const auto run = [&]<int kHeadDim>() {
    launch(arguments.call.is_causal ? gradient_kernel<Consumer<Element, kHeadDim, true>>
                                    : gradient_kernel<Consumer<Element, kHeadDim, false>>,
           {std::min<std::int64_t>(arguments.range.num_tiles, count_multiprocessors())},
           BackwardThreads::kThreads, sizeof(typename Consumer<Element, kHeadDim, true>::Shared),
           stream, arguments, "backward: gradients");
  };
  for_head_dim(arguments.call.head_dim, run);
}

extern template void run_gradient<QueryGradient, __nv_bfloat16>(const GradientArguments&,
                                                                cudaStream_t);
extern template void run_gradient<QueryGradient, __half>(const GradientArguments&, cudaStream_t);
extern template void run_gradient<KeyGradient, __nv_bfloat16>(const GradientArguments&,
                                                              cudaStream_t);
extern template void run_gradient<KeyGradient, __half>(const GradientArguments&, cudaStream_t);

}  // namespace dilated::gpu::sm90
