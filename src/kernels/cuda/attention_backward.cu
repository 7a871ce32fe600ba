// Backward: two numbers per branch row, the sums of all branches (attention_backward_sm80.cuh), and
// their rounding.
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

/// One thread per branch row. Products are summed in ascending order, as float32 products are.
__global__ void row_numbers_kernel(const __grid_constant__ NumbersArguments arguments) {
  const Call& call = arguments.call;
  const int head = static_cast<int>(blockIdx.y);
  Piece piece;
  if (!find_piece(call, call.query_groups, call.num_branches * call.num_sequences, blockIdx.x, head,
                  piece)) {
    return;
  }
  const std::int64_t row = piece.queries.first + piece.tile * arguments.tile_rows + threadIdx.x;
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
  const auto dout_at = [&](int c) {
    const float value = load_element(dout, arguments.dout.dtype, c);
    return arguments.dtype == DType::kBFloat16  ? float_of(__float2bfloat16_rn(value))
           : arguments.dtype == DType::kFloat16 ? float_of(__float2half_rn(value))
                                                : value;
  };
  float dot = 0.0f;
  if (call.needs_branch_outputs) {
    const float* const out = saved_rows(arguments.branch_out, batch, head).row(saved);
    for (int c = 0; c < call.head_dim; ++c) {
      dot = fmaf(dout_at(c), call.out_scale * out[c], dot);
    }
  } else {
    const std::byte* const out = rows_of(arguments.out, batch, head).row(token);
    for (int c = 0; c < call.head_dim; ++c) {
      dot = fmaf(dout_at(c), load_element(out, arguments.out.dtype, c), dot);
    }
  }
  const bool has_keys = sum.lse != kAbsentLse<float>;
  arguments.row_numbers[(batch * call.num_heads + head) * call.branch_rows + saved] = {
      has_keys ? call.units.base_of(sum.lse) : INFINITY, has_keys ? sum.residual : 0.0f,
      has_keys ? delta + dot : 0.0f, 0.0f};
}

struct RowsArguments {
  TensorView to;
  TensorView from;  // float32 sums; undefined: zeros
};

/// Writes every row of a gradient: sums, rounded, or zeros.
__global__ void write_rows_kernel(const __grid_constant__ RowsArguments arguments) {
  const auto& shape = arguments.to.shape;
  const std::int64_t count = shape[0] * shape[1] * shape[2] * shape[3];
  const std::int64_t threads = std::int64_t{gridDim.x} * blockDim.x;
  for (std::int64_t i = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count;
       i += threads) {
    const auto column = static_cast<int>(i % shape[3]);
    const std::int64_t head = i / shape[3] % shape[2];
    const std::int64_t row = i / shape[3] / shape[2] % shape[1];
    const std::int64_t batch = i / shape[3] / shape[2] / shape[1];
    const float value =
        arguments.from.defined()
            ? load_element(rows_of(arguments.from, batch, head).row(row), DType::kFloat32, column)
            : 0.0f;
    store_element(rows_of(arguments.to, batch, head).row(row), arguments.to.dtype, column, value);
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

  BackwardArguments arguments{
      .call = begin_call(plan, tensors.masks, context),
      .dout = tensors.dout,
      .query = tensors.query,
      .key = tensors.key,
      .value = tensors.value,
      .row_numbers = reinterpret_cast<RowNumbers*>(numbers),
      .dquery = sums_of(tensors.dquery, sums),
      .dkey = sums_of(tensors.dkey, sums + decision.query_gradient),
      .dvalue = sums_of(tensors.dvalue, sums + decision.query_gradient + decision.key_gradient),
      .groups = nullptr,
      .first_tile = 0};
  const TensorView* const all_sums[] = {&arguments.dquery, &arguments.dkey, &arguments.dvalue};
  const TensorView* const results[] = {&tensors.dquery, &tensors.dkey, &tensors.dvalue};
  for (const TensorView* const view : all_sums) {
    write_rows(*view, {}, stream);
  }
  launch(row_numbers_kernel, {decision.query_tiles.back(), problem.num_heads}, decision.tiles.rows,
         0, stream,
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
                          .tile_rows = decision.tiles.rows},
         "backward: row numbers");
  if (decision.not_sm90.empty() && tensors.dout.dtype == problem.dtype) {
    sm90::branches_backward(arguments, plan, reinterpret_cast<int*>(tickets), stream);
  } else if (problem.dtype == DType::kBFloat16) {
    branches_backward<__nv_bfloat16>(arguments, decision, stream);
  } else if (problem.dtype == DType::kFloat16) {
    branches_backward<__half>(arguments, decision, stream);
  } else {
    branches_backward<float>(arguments, decision, stream);
  }
  for (int i = 0; i < 3; ++i) {
    if (results[i]->dtype != DType::kFloat32) {
      write_rows(*results[i], *all_sums[i], stream);
    }
  }
}

}  // namespace dilated::gpu
