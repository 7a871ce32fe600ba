// Forward on cards of compute capability 8.0 and newer (semantics §4), in two steps:
//   1. every branch: one block per tile of query rows of one class. Softmax over its keys in tiles,
//        S = Q K^T,  P = 2^(f (S - max)),  sums = sums 2^(f (old max - max)) + P V,
//      then (O_b, max, sum) to the row's place in the branch's compact rows.
//   2. merge: every query row of every head reads what its branches wrote (attention_merge.cu).
// Bits of a row depend neither on its place in the tile nor on other rows.
#pragma once

#include "src/kernels/cuda/call.h"
#include "src/kernels/cuda/device/launch.cuh"
#include "src/kernels/cuda/device/piece.cuh"
#include "src/kernels/cuda/device/tile.cuh"
#include "src/merge.h"

namespace dilated::gpu {

struct ForwardArguments {
  Call call;
  ConstTensorView query;
  ConstTensorView key;
  ConstTensorView value;
  TensorView branch_out;  // (batch, heads, branch_rows, head_dim), float32
  TensorView branch_lse;  // if the caller wants it
  float2* branch_sums;    // (batch, heads, branch_rows): max, sum
};

template <typename Element, int kDim>
struct ForwardTiles {
  static constexpr TileShape kShape = tile_shape(kDim * static_cast<int>(sizeof(Element)));
  static constexpr int kThreads = kShape.rows / kWarpRows * 32;
  /// Blocks of one multiprocessor: more hide latencies, fewer have more registers.
  static constexpr int kBlocks = kDim <= 64 ? 4 : kDim <= 128 ? 3 : 2;
  using Queries = SharedTile<Element, kShape.rows, kDim>;
  using Keys = SharedTile<Element, kShape.forward_columns, kDim>;

  Queries query;
  Keys key;
  Keys value;
  unsigned char bad[kShape.forward_columns];
};

template <typename Element, int kDim>
__global__ void __launch_bounds__(ForwardTiles<Element, kDim>::kThreads,
                                  ForwardTiles<Element, kDim>::kBlocks)
    forward_kernel(const __grid_constant__ ForwardArguments arguments) {
  using Tiles = ForwardTiles<Element, kDim>;
  constexpr int kColumns = Tiles::kShape.forward_columns;
  extern __shared__ __align__(16) unsigned char shared_memory[];
  Tiles& tiles = *reinterpret_cast<Tiles*>(shared_memory);
  const Call& call = arguments.call;
  const int head = static_cast<int>(blockIdx.y);
  const int kv_head = head / call.heads_per_kv_head;

  Piece piece;
  if (!find_piece(call, call.query_groups, call.num_branches * call.num_sequences, blockIdx.x, head,
                  piece)) {
    return;
  }
  const std::int64_t first = piece.queries.first + piece.tile * Tiles::kShape.rows;
  const std::int64_t last = min(first + Tiles::kShape.rows, piece.queries.last);
  if (first >= last) {
    return;
  }
  const std::int64_t keys_end = call.is_causal ? min(piece.keys.last, last) : piece.keys.last;
  const std::int64_t batch = piece.sequence.batch;
  const KeyFilter takes_part(call.masks, batch);
  const auto queries = rows_of(arguments.query, batch, head);
  const auto keys = rows_of(arguments.key, batch, kv_head);
  const auto values = rows_of(arguments.value, batch, kv_head);
  const int warp_row = static_cast<int>(threadIdx.x) / 32 * kWarpRows;
  const int lane_row = warp_row + static_cast<int>(threadIdx.x) % 32 / 4;  // and this + 8
  const std::int64_t saved_first = piece.saved_row(first);
  const RowDropout dropout = dropout_of(call, piece, head);
  const auto phantoms = static_cast<float>(
      call.has_phantoms ? piece.geometry.phantoms(piece.segment, piece.offset, piece.sequence.keys)
                        : 0);

  const auto load_keys = [&](typename Tiles::Keys& tile, const Rows<const std::byte>& rows,
                             std::int64_t at) {
    load_tile<Tiles::kThreads>(tile, rows, piece.keys, at, keys_end, call.head_dim,
                               call.copies_16_bytes, takes_part);
    close_copies();
  };
  load_tile<Tiles::kThreads>(tiles.query, queries, piece.queries, first, last, call.head_dim,
                             call.copies_16_bytes, [](std::int64_t) { return true; });
  if (piece.keys.first < keys_end) {
    load_keys(tiles.key, keys, piece.keys.first);
  }

  const float factor = call.units.factor();
  const float sign = call.units.sign();
  float sums[kDim / 8][4] = {};
  ScaledSum<float> rows[2];  // sum: this lane's part
  for (std::int64_t k = piece.keys.first; k < keys_end; k += kColumns) {
    __syncthreads();  // values of the tile before are no longer read
    load_keys(tiles.value, values, k);
    wait_for_copies<1>();
    __syncthreads();
    float scores[kColumns / 8][4];
    multiply_rows(scores, tiles.query, warp_row, tiles.key);
    __syncthreads();
    if (k + kColumns < keys_end) {
      load_keys(tiles.key, keys, k + kColumns);
    } else {
      close_copies();
    }

    const int present = distance(keys_end, k);  // keys of this tile
    const int seen = call.is_causal ? distance(first, k) + lane_row : kColumns;  // the last one
    const auto sees = [&](int row, int column) { return column <= seen + row; };
    const bool diagonal = call.is_causal && k + kColumns - 1 > first;
    if (sign != 1.0f) {
      for_each_entry(scores, [&](float& score, int, int) { score *= sign; });
    }
    if (diagonal || present < kColumns) {
      for_each_entry(scores, [&](float& score, int half, int column) {
        score = column < present && sees(8 * half, column) ? score : kAbsentLse<float>;
      });
    }
    if (call.masks.key_mask.defined()) {
      for_each_entry_apart(scores, [&](float& score, int, int column) {
        const bool taken = column < present && takes_part(piece.keys.row(k + column));
        score = taken ? score : kAbsentLse<float>;
      });
    }
    float top[2] = {rows[0].max, rows[1].max};
    for_each_entry(scores,
                   [&](float& score, int half, int) { top[half] = fmaxf(top[half], score); });
    float base[2];
    float shrink[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      top[half] = quad_max(top[half]);
      // A row without keys so far: 0 in place of -inf keeps -inf - (-inf) out.
      base[half] = top[half] == kAbsentLse<float> ? 0.0f : top[half];
      shrink[half] = power_of_2(factor * (rows[half].max - base[half]));
      rows[half] = {top[half], rows[half].sum * shrink[half]};
    }
    for_each_entry(scores, [&](float& score, int half, int) {
      score = power_of_2(factor * (score - base[half]));
      rows[half].sum += score;
    });
    if (call.dropout_p > 0.0) {
      for_each_entry_apart(scores, [&](float& p, int half, int column) {
        p *= dropout(first + lane_row + 8 * half, k + column);
      });
    }
    for_each_entry(sums, [&](float& sum, int half, int) { sum *= shrink[half]; });
    wait_for_copies<1>();
    __syncthreads();
    if (diagonal) {
      add_bad_rows(sums, scores, tiles.value, tiles.bad, sees);
    }
    add_product(sums, scores, tiles.value);
  }

  float normalise[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    ScaledSum<float>& row = rows[half];
    row.sum = quad_sum(row.sum);
    float shrink = 1.0f;
    if (phantoms > 0.0f) {  // keys of score 0
      const float top = fmaxf(row.max, 0.0f);
      shrink = call.units.power(row.max - top);
      row = {top, row.sum * shrink + phantoms * call.units.power(-top)};
    }
    normalise[half] = row.max == kAbsentLse<float> ? 0.0f : shrink / row.sum;
  }
  const auto out = saved_rows(arguments.branch_out, batch, head);
  const bool writes_pairs = call.head_dim % 2 == 0 && arguments.branch_out.strides[2] % 2 == 0;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = lane_row + 8 * half;
    if (first + row >= last) {
      continue;
    }
    const std::int64_t at = saved_first + row;
    float* const to = out.row(at);
    const int pair = 2 * (static_cast<int>(threadIdx.x) % 4);
#pragma unroll
    for (int j = 0; j < kDim / 8; ++j) {
      const int column = 8 * j + pair;
      const float x = sums[j][2 * half] * normalise[half];
      const float y = sums[j][2 * half + 1] * normalise[half];
      if (writes_pairs) {
        if (column < call.head_dim) {
          *reinterpret_cast<float2*>(to + column) = {x, y};
        }
      } else {
        if (column < call.head_dim) {
          to[column] = x;
        }
        if (column + 1 < call.head_dim) {
          to[column + 1] = y;
        }
      }
    }
    if (pair == 0) {
      arguments.branch_sums[(batch * call.num_heads + head) * call.branch_rows + at] = {
          rows[half].max, rows[half].sum};
      if (arguments.branch_lse.defined()) {
        const LogSum saved = call.units.log_sum(rows[half]);
        float* const two = saved_rows(arguments.branch_lse, batch, head).row(at);
        two[0] = saved.lse;
        two[1] = saved.residual;
      }
    }
  }
}

template <typename Element, int kDim>
void launch_forward(const ForwardArguments& arguments, const CudaDecision& decision,
                    cudaStream_t stream) {
  using Tiles = ForwardTiles<Element, kDim>;
  launch(forward_kernel<Element, kDim>, {decision.query_tiles.back(), arguments.call.num_heads},
         Tiles::kThreads, sizeof(Tiles), stream, arguments, "forward");
}

/// Step 1 for one dtype; each is a file of its own, so that they compile side by side.
template <typename Element>
void branches_forward(const ForwardArguments& arguments, const CudaDecision& decision,
                      cudaStream_t stream) {
  switch (decision.padded_head_dim) {
    case 32:
      return launch_forward<Element, 32>(arguments, decision, stream);
    case 64:
      return launch_forward<Element, 64>(arguments, decision, stream);
    case 128:
      return launch_forward<Element, 128>(arguments, decision, stream);
    default:
      return launch_forward<Element, 256>(arguments, decision, stream);
  }
}

extern template void branches_forward<float>(const ForwardArguments&, const CudaDecision&,
                                             cudaStream_t);
extern template void branches_forward<__nv_bfloat16>(const ForwardArguments&, const CudaDecision&,
                                                     cudaStream_t);
extern template void branches_forward<__half>(const ForwardArguments&, const CudaDecision&,
                                              cudaStream_t);

}  // namespace dilated::gpu
