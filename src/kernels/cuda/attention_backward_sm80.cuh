// Backward on cards of compute capability 8.0 and newer (semantics §6; docs/architecture.md,
// "Backward in one form"), without atomics, in seven products instead of five: scores and dP are
// computed twice, so that every gradient row has one block per branch that sums it in order.
//   query rows stay:  S = Q K^T      dP = dO V^T      dQ += dS K
//   key rows stay:    S^T = K Q^T    dP^T = V dO^T    dV += P^T dO     dK += dS^T Q
// Branches run one after another, longest segments first, and add to float32 sums.
#pragma once

#include "src/kernels/cuda/attention_backward.h"
#include "src/kernels/cuda/device/launch.cuh"
#include "src/kernels/cuda/device/piece.cuh"
#include "src/kernels/cuda/device/tile.cuh"

namespace dilated::gpu {

/// P = 2^(f (S - base) - residual). Product and difference are rounded one by one, as in the
/// residual itself.
__device__ inline float probability(float score, float factor, const RowNumbers& row) {
  return power_of_2(__fsub_rn(__fmul_rn(factor, score - row.base), row.residual));
}

template <int kCount>
__device__ void add_rows(const float (&sums)[kCount][4], const Rows<std::byte>& rows, float scale,
                         int head_dim, const std::int64_t (&at)[2], const bool (&writes)[2]) {
  const int pair = 2 * (static_cast<int>(threadIdx.x) % 4);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (!writes[half]) {
      continue;
    }
    float* const row = reinterpret_cast<float*>(rows.row(at[half]));
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int column = 8 * j + pair + e;
        if (column < head_dim) {
          row[column] += scale * sums[j][2 * half + e];
        }
      }
    }
  }
}

template <typename Element, int kDim>
struct BackwardTiles {
  static constexpr TileShape kShape = tile_shape(kDim * static_cast<int>(sizeof(Element)));
  static constexpr int kThreads = kShape.rows / kWarpRows * 32;
  using Staying = SharedTile<Element, kShape.rows, kDim>;
  using Passing = SharedTile<Element, kShape.backward_columns, kDim>;

  Staying staying[2];
  Passing passing[2];
  RowNumbers numbers[kShape.backward_columns];
  unsigned char bad[kShape.backward_columns];
};

/// dQ of one tile of query rows.
template <typename Element, int kDim>
__global__ void __launch_bounds__(BackwardTiles<Element, kDim>::kThreads)
    query_gradient_kernel(const __grid_constant__ BackwardArguments arguments) {
  using Tiles = BackwardTiles<Element, kDim>;
  constexpr int kColumns = Tiles::kShape.backward_columns;
  extern __shared__ __align__(16) unsigned char shared_memory[];
  Tiles& tiles = *reinterpret_cast<Tiles*>(shared_memory);
  auto& [query, dout] = tiles.staying;
  auto& [key, value] = tiles.passing;
  const Call& call = arguments.call;
  const int head = static_cast<int>(blockIdx.y);
  const int kv_head = head / call.heads_per_kv_head;

  Piece piece;
  if (!find_piece(call, arguments.groups, call.num_sequences, arguments.first_tile + blockIdx.x,
                  head, piece)) {
    return;
  }
  const std::int64_t first = piece.queries.first + piece.tile * Tiles::kShape.rows;
  const std::int64_t last = min(first + Tiles::kShape.rows, piece.queries.last);
  const std::int64_t keys_end = call.is_causal ? min(piece.keys.last, last) : piece.keys.last;
  if (first >= last || piece.keys.first >= keys_end) {
    return;
  }
  const std::int64_t batch = piece.sequence.batch;
  const KeyFilter takes_part(call.masks, batch);
  const auto everything = [](std::int64_t) { return true; };
  const auto keys = rows_of(arguments.key, batch, kv_head);
  const auto values = rows_of(arguments.value, batch, kv_head);
  const int warp_row = static_cast<int>(threadIdx.x) / 32 * kWarpRows;
  const int lane_row = warp_row + static_cast<int>(threadIdx.x) % 32 / 4;  // and this + 8
  const RowDropout dropout = dropout_of(call, piece, head);

  load_tile<Tiles::kThreads>(query, rows_of(arguments.query, batch, head), piece.queries, first,
                             last, call.head_dim, call.copies_16_bytes, everything);
  load_tile<Tiles::kThreads>(dout, rows_of(arguments.dout, batch, head), piece.queries, first, last,
                             call.head_dim, call.copies_16_bytes, everything);
  RowNumbers numbers[2] = {{INFINITY, 0.0f, 0.0f, 0.0f}, {INFINITY, 0.0f, 0.0f, 0.0f}};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (first + lane_row + 8 * half < last) {
      numbers[half] = arguments.row_numbers[(batch * call.num_heads + head) * call.branch_rows +
                                            piece.saved_row(first) + lane_row + 8 * half];
    }
  }

  const float factor = call.units.factor();
  const float sign = call.units.sign();
  float sums[kDim / 8][4] = {};
  for (std::int64_t k = piece.keys.first; k < keys_end; k += kColumns) {
    __syncthreads();
    load_tile<Tiles::kThreads>(key, keys, piece.keys, k, keys_end, call.head_dim,
                               call.copies_16_bytes, takes_part);
    load_tile<Tiles::kThreads>(value, values, piece.keys, k, keys_end, call.head_dim,
                               call.copies_16_bytes, takes_part);
    close_copies();
    wait_for_copies<0>();
    __syncthreads();
    float scores[kColumns / 8][4];
    float dscores[kColumns / 8][4];
    multiply_rows(scores, query, warp_row, key);
    multiply_rows(dscores, dout, warp_row, value);

    const int present = distance(keys_end, k);  // keys of this tile
    const int seen = call.is_causal ? distance(first, k) + lane_row : kColumns;  // the last one
    const auto sees = [&](int row, int column) { return column <= seen + row; };
    const bool diagonal = call.is_causal && k + kColumns - 1 > first;
    if (sign != 1.0f) {
      for_each_entry(scores, [&](float& score, int, int) { score *= sign; });
    }
    for_each_entry(scores, [&](float& score, int half, int) {
      score = probability(score, factor, numbers[half]);
    });
    if (call.dropout_p > 0.0) {
      for_each_entry_apart(dscores, [&](float& dp, int half, int column) {
        dp *= dropout(first + lane_row + 8 * half, k + column);
      });
    }
#pragma unroll
    for (int j = 0; j < kColumns / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        dscores[j][e] = scores[j][e] * (call.out_scale * dscores[j][e] - numbers[e / 2].delta);
      }
    }
    if (diagonal || present < kColumns) {
      for_each_entry(dscores, [&](float& ds, int half, int column) {
        ds = column < present && sees(8 * half, column) ? ds : 0.0f;
      });
    }
    if (call.masks.key_mask.defined()) {
      for_each_entry_apart(dscores, [&](float& ds, int, int column) {
        ds = column < present && takes_part(piece.keys.row(k + column)) ? ds : 0.0f;
      });
    }
    if (diagonal) {
      __syncthreads();  // other warps may still read the keys that are zeroed
      add_bad_rows(sums, dscores, key, tiles.bad, sees);
    }
    add_product(sums, dscores, key);
  }
  add_rows(sums, rows_of(arguments.dquery, batch, head), call.scale, call.head_dim,
           {piece.queries.row(first + lane_row), piece.queries.row(first + lane_row + 8)},
           {first + lane_row < last, first + lane_row + 8 < last});
}

/// dK, dV or both of one tile of key rows, for the query heads of one key/value head whose offset
/// is that of head blockIdx.y, which is the first such head.
template <typename Element, int kDim, bool kKey, bool kValue>
__global__ void __launch_bounds__(BackwardTiles<Element, kDim>::kThreads)
    key_gradient_kernel(const __grid_constant__ BackwardArguments arguments) {
  using Tiles = BackwardTiles<Element, kDim>;
  constexpr int kColumns = Tiles::kShape.backward_columns;
  extern __shared__ __align__(16) unsigned char shared_memory[];
  Tiles& tiles = *reinterpret_cast<Tiles*>(shared_memory);
  auto& [key, value] = tiles.staying;
  auto& [query, dout] = tiles.passing;
  const Call& call = arguments.call;
  const int first_head = static_cast<int>(blockIdx.y);
  const int kv_head = first_head / call.heads_per_kv_head;

  Piece piece;
  if (!find_piece(call, arguments.groups, call.num_sequences, arguments.first_tile + blockIdx.x,
                  first_head, piece)) {
    return;
  }
  const std::int64_t* const offsets = call.offsets + std::int64_t{piece.branch} * call.num_heads;
  for (int head = kv_head * call.heads_per_kv_head; head < first_head; ++head) {
    if (offsets[head] == piece.offset) {
      return;  // that head's block sums these rows
    }
  }
  const std::int64_t first = piece.keys.first + piece.tile * Tiles::kShape.rows;
  const std::int64_t last = min(first + Tiles::kShape.rows, piece.keys.last);
  if (first >= last) {
    return;
  }
  const std::int64_t batch = piece.sequence.batch;
  const KeyFilter takes_part(call.masks, batch);
  const auto everything = [](std::int64_t) { return true; };
  const int warp_row = static_cast<int>(threadIdx.x) / 32 * kWarpRows;
  const int lane_row = warp_row + static_cast<int>(threadIdx.x) % 32 / 4;  // and this + 8
  const std::int64_t saved_zero = piece.saved_row(0);
  load_tile<Tiles::kThreads>(key, rows_of(arguments.key, batch, kv_head), piece.keys, first, last,
                             call.head_dim, call.copies_16_bytes, takes_part);
  load_tile<Tiles::kThreads>(value, rows_of(arguments.value, batch, kv_head), piece.keys, first,
                             last, call.head_dim, call.copies_16_bytes, takes_part);

  const float factor = call.units.factor();
  const float sign = call.units.sign();
  const std::int64_t queries_begin =
      call.is_causal ? max(piece.queries.first, first) : piece.queries.first;
  float dkey[kKey ? kDim / 8 : 1][4] = {};
  float dvalue[kValue ? kDim / 8 : 1][4] = {};
  for (int head = first_head; head < (kv_head + 1) * call.heads_per_kv_head; ++head) {
    if (offsets[head] != piece.offset) {
      continue;
    }
    const RowDropout dropout = dropout_of(call, piece, head);
    const auto queries = rows_of(arguments.query, batch, head);
    const auto douts = rows_of(arguments.dout, batch, head);
    const RowNumbers* const row_numbers =
        arguments.row_numbers + (batch * call.num_heads + head) * call.branch_rows;
    for (std::int64_t q = queries_begin; q < piece.queries.last; q += kColumns) {
      __syncthreads();
      load_tile<Tiles::kThreads>(query, queries, piece.queries, q, piece.queries.last,
                                 call.head_dim, call.copies_16_bytes, everything);
      load_tile<Tiles::kThreads>(dout, douts, piece.queries, q, piece.queries.last, call.head_dim,
                                 call.copies_16_bytes, everything);
      close_copies();
      for (int i = static_cast<int>(threadIdx.x); i < kColumns; i += Tiles::kThreads) {
        tiles.numbers[i] = q + i < piece.queries.last ? row_numbers[saved_zero + q + i]
                                                      : RowNumbers{INFINITY, 0.0f, 0.0f, 0.0f};
      }
      wait_for_copies<0>();
      __syncthreads();
      float scores[kColumns / 8][4];
      multiply_rows(scores, key, warp_row, query);

      const int unseen = call.is_causal ? distance(first, q) + lane_row : 0;  // earlier queries
      const auto sees = [&](int row, int column) { return column >= unseen + row; };
      const bool diagonal = call.is_causal && q < first + Tiles::kShape.rows - 1;
      if (sign != 1.0f) {
        for_each_entry(scores, [&](float& score, int, int) { score *= sign; });
      }
      for_each_entry(scores, [&](float& score, int, int column) {
        score = probability(score, factor, tiles.numbers[column]);
      });
      if (diagonal) {
        for_each_entry(
            scores, [&](float& p, int half, int column) { p = sees(8 * half, column) ? p : 0.0f; });
      }
      const auto drop = [&](float& x, int half, int column) {
        x *= dropout(q + column, first + lane_row + 8 * half);
      };
      if constexpr (kKey) {
        float dscores[kColumns / 8][4];
        multiply_rows(dscores, value, warp_row, dout);
        if (call.dropout_p > 0.0) {
          for_each_entry_apart(dscores, drop);
        }
        const int pair = 2 * (static_cast<int>(threadIdx.x) % 4);
#pragma unroll
        for (int j = 0; j < kColumns / 8; ++j) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const float delta = tiles.numbers[8 * j + pair + e % 2].delta;
            dscores[j][e] = scores[j][e] * (call.out_scale * dscores[j][e] - delta);
          }
        }
        if (diagonal) {
          for_each_entry(dscores, [&](float& ds, int half, int column) {
            ds = sees(8 * half, column) ? ds : 0.0f;
          });
        }
        if (diagonal) {
          __syncthreads();
          add_bad_rows(dkey, dscores, query, tiles.bad, sees);
        }
        add_product(dkey, dscores, query);
      }
      if constexpr (kValue) {
        if (call.dropout_p > 0.0) {
          for_each_entry_apart(scores, drop);
        }
        if (diagonal) {
          __syncthreads();
          add_bad_rows(dvalue, scores, dout, tiles.bad, sees);
        }
        add_product(dvalue, scores, dout);
      }
    }
  }
  const std::int64_t row = first + lane_row;
  const std::int64_t at[2] = {piece.keys.row(row), piece.keys.row(row + 8)};
  const bool writes[2] = {row < last && takes_part(at[0]), row + 8 < last && takes_part(at[1])};
  if constexpr (kKey) {
    add_rows(dkey, rows_of(arguments.dkey, batch, kv_head), call.scale, call.head_dim, at, writes);
  }
  if constexpr (kValue) {
    add_rows(dvalue, rows_of(arguments.dvalue, batch, kv_head), call.out_scale, call.head_dim, at,
             writes);
  }
}

template <typename Element, int kDim>
void launch_backward(BackwardArguments arguments, const CudaDecision& decision,
                     cudaStream_t stream) {
  using Tiles = BackwardTiles<Element, kDim>;
  const Call& call = arguments.call;
  const auto run = [&](void (*kernel)(BackwardArguments), std::int64_t tiles, const char* what) {
    launch(kernel, {tiles, call.num_heads}, Tiles::kThreads, sizeof(Tiles), stream, arguments,
           what);
  };
  for (std::size_t rank = decision.branch_order.size(); rank-- > 0;) {
    const std::size_t group = rank * static_cast<std::size_t>(call.num_sequences);
    arguments.groups = call.query_groups + group;
    arguments.first_tile = decision.query_tiles[rank];
    run(query_gradient_kernel<Element, kDim>,
        decision.query_tiles[rank + 1] - decision.query_tiles[rank], "backward: dquery");
    arguments.groups = call.key_groups + group;
    arguments.first_tile = decision.key_tiles[rank];
    const std::int64_t tiles = decision.key_tiles[rank + 1] - decision.key_tiles[rank];
    if constexpr (kDim <= 128) {
      run(key_gradient_kernel<Element, kDim, true, true>, tiles, "backward: dkey, dvalue");
    } else {  // both sums do not fit into registers
      run(key_gradient_kernel<Element, kDim, true, false>, tiles, "backward: dkey");
      run(key_gradient_kernel<Element, kDim, false, true>, tiles, "backward: dvalue");
    }
  }
}

/// All branches for one dtype; each is a file of its own, so that they compile side by side.
template <typename Element>
void branches_backward(const BackwardArguments& arguments, const CudaDecision& decision,
                       cudaStream_t stream) {
  switch (decision.padded_head_dim) {
    case 32:
      return launch_backward<Element, 32>(arguments, decision, stream);
    case 64:
      return launch_backward<Element, 64>(arguments, decision, stream);
    case 128:
      return launch_backward<Element, 128>(arguments, decision, stream);
    default:
      return launch_backward<Element, 256>(arguments, decision, stream);
  }
}

extern template void branches_backward<float>(const BackwardArguments&, const CudaDecision&,
                                              cudaStream_t);
extern template void branches_backward<__nv_bfloat16>(const BackwardArguments&, const CudaDecision&,
                                                      cudaStream_t);
extern template void branches_backward<__half>(const BackwardArguments&, const CudaDecision&,
                                               cudaStream_t);

}  // namespace dilated::gpu
