// Backward: two numbers per branch row, the sums of all branches (attention_backward_sm80.cuh), and
// their rounding.
#include <algorithm>
#include <iterator>

#include "src/kernels/cuda/attention_backward_sm80.cuh"
#include "src/kernels/cuda/attention_backward_sm90.h"

namespace dilated::gpu {
namespace {

struct NumbersArguments {
  Call call;
  DType dtype;  // of the products: dO is rounded to it here as it is there
  ConstTensorView dout;
  ConstRowView dlse;
  ConstTensorView out;
  ConstRowView lse;
  ConstRowView lse_residual;
  ConstTensorView branch_out;
  ConstTensorView branch_lse;
  RowNumbers* row_numbers;
  int tile_rows;
  bool of_dense;  // tiles are those of a dense branch; others of the row get the same numbers
};

/// Branches that cover position `p` for a head.
__device__ int covering_branches(const Call& call, std::int64_t length, int head, std::int64_t p) {
  int count = 0;
  for (int b = 0; b < call.num_branches; ++b) {
    const BranchGeometry geometry(length, call.branches[b].segment, call.branches[b].dilation);
    count += geometry.covers(p, call.offsets[std::int64_t{b} * call.num_heads + head]) ? 1 : 0;
  }
  return count;
}

inline constexpr int kRowThreads = 8;

/// Eight threads per branch row.
__global__ void row_numbers_kernel(const __grid_constant__ NumbersArguments arguments) {
  const Call& call = arguments.call;
  const int head = static_cast<int>(blockIdx.y);
  Piece piece;
  if (!find_piece(call, call.query_groups, call.num_branches * call.num_sequences, blockIdx.x, head,
                  piece)) {
    return;
  }
  const std::int64_t row =
      piece.queries.first + piece.tile * arguments.tile_rows + threadIdx.x / kRowThreads;
  if (row >= piece.queries.last) {
    return;
  }
  const std::int64_t batch = piece.sequence.batch;
  const std::int64_t token = piece.queries.row(row);
  const std::int64_t saved = piece.saved_row(row);
  const float dlse = arguments.dlse.defined() ? item_at(arguments.dlse, batch, head, token) : 0.0f;
  LogSum sum{item_at(arguments.lse, batch, head, token),
             arguments.lse_residual.defined() ? item_at(arguments.lse_residual, batch, head, token)
                                              : 0.0f};
  float delta = -dlse;
  if (call.needs_branch_outputs && call.merge != Merge::kLse) {
    const float* const pair = saved_rows(arguments.branch_lse, batch, head).row(saved);
    const LogSum branch{pair[0], pair[1]};
    const auto count = static_cast<float>(
        call.merge == Merge::kMean
            ? covering_branches(call, piece.sequence.length, head, piece.position(row))
            : 1);
    // A branch without keys: -inf - -inf must not appear, the row contributes nothing.
    delta = branch.lse == kAbsentLse<float> ? 0.0f : delta * count * call.units.share(branch, sum);
    sum = {branch.lse, branch.residual + log2f(count)};
  }
  const std::byte* const dout = rows_of(arguments.dout, batch, head).row(token);
  const bool of_branch = call.needs_branch_outputs;
  const std::byte* const out = of_branch
                                   ? reinterpret_cast<const std::byte*>(
                                         saved_rows(arguments.branch_out, batch, head).row(saved))
                                   : rows_of(arguments.out, batch, head).row(token);
  const DType out_dtype = of_branch ? DType::kFloat32 : arguments.out.dtype;
  const auto rounded = [&](float value) {
    return arguments.dtype == DType::kBFloat16  ? float_of(__float2bfloat16_rn(value))
           : arguments.dtype == DType::kFloat16 ? float_of(__float2half_rn(value))
                                                : value;
  };
  const int lane = threadIdx.x % kRowThreads;
  float dot = 0.0f;
  for (int c = kPieceColumns * lane; c < call.head_dim; c += kPieceColumns * kRowThreads) {
    float douts[kPieceColumns];
    float outs[kPieceColumns];
    load_piece(dout, arguments.dout.dtype, c, call.head_dim, douts);
    load_piece(out, out_dtype, c, call.head_dim, outs);
#pragma unroll
    for (int i = 0; i < kPieceColumns; ++i) {
      dot = fmaf(rounded(douts[i]), of_branch ? call.out_scale * outs[i] : outs[i], dot);
    }
  }
  const unsigned mates = 0xFFu << (threadIdx.x % 32 / kRowThreads * kRowThreads);
#pragma unroll
  for (int step = 1; step < kRowThreads; step *= 2) {
    dot += __shfl_xor_sync(mates, dot, step);
  }
  const bool has_keys = sum.lse != kAbsentLse<float>;
  const RowNumbers numbers = {has_keys ? call.units.base_of(sum.lse) : INFINITY,
                              has_keys ? sum.residual : 0.0f, has_keys ? delta + dot : 0.0f, 0.0f};
  RowNumbers* const to = arguments.row_numbers + (batch * call.num_heads + head) * call.branch_rows;
  for (int rank = lane; rank < (arguments.of_dense ? call.num_branches : 1); rank += kRowThreads) {
    const std::int64_t slot = rank == 0
                                  ? saved
                                  : SlotFinder(call, piece.sequence_index, piece.sequence.length,
                                               rank, head)(static_cast<int>(piece.position(row)));
    if (slot >= 0) {
      to[slot] = numbers;
    }
  }
}

struct RowsArguments {
  TensorView to;
  TensorView from;  // float32 sums; undefined: zeros
};

/// Writes every row of a gradient: sums, rounded, or zeros.
__global__ void write_rows_kernel(const __grid_constant__ RowsArguments arguments) {
  const auto& shape = arguments.to.shape;
  const auto columns = static_cast<int>(shape[3]);
  const std::int64_t pieces = (columns + kPieceColumns - 1) / kPieceColumns;
  const std::int64_t count = shape[0] * shape[1] * shape[2] * pieces;
  const std::int64_t threads = std::int64_t{gridDim.x} * blockDim.x;
  for (std::int64_t i = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count;
       i += threads) {
    const auto column = static_cast<int>(i % pieces) * kPieceColumns;
    const std::int64_t head = i / pieces % shape[2];
    const std::int64_t row = i / pieces / shape[2] % shape[1];
    const std::int64_t batch = i / pieces / shape[2] / shape[1];
    float values[kPieceColumns] = {};
    if (arguments.from.defined()) {
      load_piece(rows_of(arguments.from, batch, head).row(row), DType::kFloat32, column, columns,
                 values);
    }
    store_piece(rows_of(arguments.to, batch, head).row(row), arguments.to.dtype, column, columns,
                values);
  }
}

void write_rows(const TensorView& to, const TensorView& from, cudaStream_t stream) {
  launch(write_rows_kernel, {4096}, 256, 0, stream, RowsArguments{to, from}, "backward: rows");
}

/// Where a gradient is summed: in the result if that is float32, else at `memory`.
TensorView sums_of(const TensorView& result, std::byte* memory) {
  if (result.dtype == DType::kFloat32) {
    return result;
  }
  const std::int64_t token = result.shape[2] * result.shape[3];
  return {
      memory, DType::kFloat32, result.shape, {result.shape[1] * token, token, result.shape[3], 1}};
}

}  // namespace

void attention_backward(const Plan& plan, const BackwardTensors& tensors, const Context& context) {
  const Problem& problem = plan.problem();
  const auto& decision = static_cast<const CudaDecision&>(plan.decision());
  const cudaStream_t stream = stream_of(context);
  const DeviceGuard guard(problem.device.index);
  std::byte* const tickets = context.workspace.data() + decision.table_bytes;
  std::byte* const numbers = tickets + decision.tickets;
  std::byte* const sums = numbers + decision.row_numbers;

  const TensorView* const results[] = {&tensors.dquery, &tensors.dkey, &tensors.dvalue};
  std::byte* const memory[] = {sums, sums + decision.query_gradient,
                               sums + decision.query_gradient + decision.key_gradient};
  const bool on_sm90 = decision.not_sm90.empty() && tensors.dout.dtype == problem.dtype;
  const bool merges = on_sm90 && decision.merges_gradients &&
                      std::all_of(std::begin(results), std::end(results),
                                  [&](const auto* view) { return view->dtype == problem.dtype; });
  const auto target = [&](int i) { return merges ? *results[i] : sums_of(*results[i], memory[i]); };
  BackwardArguments arguments{.call = begin_call(plan, tensors.masks, context),
                              .dout = tensors.dout,
                              .query = tensors.query,
                              .key = tensors.key,
                              .value = tensors.value,
                              .row_numbers = reinterpret_cast<RowNumbers*>(numbers),
                              .dquery = target(0),
                              .dkey = target(1),
                              .dvalue = target(2),
                              .groups = nullptr,
                              .first_tile = 0};
  const TensorView* const targets[] = {&arguments.dquery, &arguments.dkey, &arguments.dvalue};
  for (int i = 0; i < 3 && !merges; ++i) {
    write_rows(*targets[i], {}, stream);
  }
  const bool of_dense = decision.merges_gradients && !plan.needs_branch_outputs();
  launch(row_numbers_kernel,
         {of_dense ? decision.query_tiles[1] : decision.query_tiles.back(), problem.num_heads},
         kRowThreads * decision.tiles.rows, 0, stream,
         NumbersArguments{.call = arguments.call,
                          .dtype = problem.dtype,
                          .dout = tensors.dout,
                          .dlse = tensors.dlse,
                          .out = tensors.out,
                          .lse = tensors.lse,
                          .lse_residual = tensors.lse_residual,
                          .branch_out = tensors.branch_out,
                          .branch_lse = tensors.branch_lse,
                          .row_numbers = arguments.row_numbers,
                          .tile_rows = decision.tiles.rows,
                          .of_dense = of_dense},
         "backward: row numbers");
  if (on_sm90) {
    const auto parts = [&](int i) {
      return merges ? reinterpret_cast<float*>(memory[i]) : nullptr;
    };
    sm90::branches_backward(arguments, {parts(0), parts(1), parts(2)}, plan,
                            reinterpret_cast<int*>(tickets), stream);
  } else if (problem.dtype == DType::kBFloat16) {
    branches_backward<__nv_bfloat16>(arguments, decision, stream);
  } else if (problem.dtype == DType::kFloat16) {
    branches_backward<__half>(arguments, decision, stream);
  } else {
    branches_backward<float>(arguments, decision, stream);
  }
  for (int i = 0; i < 3 && !merges; ++i) {
    if (results[i]->dtype != DType::kFloat32) {
      write_rows(*results[i], *targets[i], stream);
    }
  }
}

}  // namespace dilated::gpu
