// Forward: what every branch contributes (attention_forward_sm80.cuh), then their merge (semantics
// §4 and §5) into out and lse, each of whose rows is written once.
#include "src/kernels/cuda/attention_forward_sm80.cuh"
#include "src/kernels/cuda/attention_forward_sm90.h"

namespace dilated::gpu {
namespace {

/// A branch at one position: the residue of the classes that hold it, and its place in saved rows.
struct Place {
  std::int64_t residue;
  std::int64_t saved_row;
};

struct MergeArguments {
  Call call;
  std::int64_t rows_per_block;
  ConstTensorView branch_out;
  const float2* branch_sums;
  TensorView out;
  RowView lse;
  RowView lse_residual;
};

constexpr int kMergeThreads = 256;

/// One block: some query rows of a sequence, all heads; one thread: kWidth columns of a row.
template <int kWidth>
__global__ void __launch_bounds__(kMergeThreads)
    merge_kernel(const __grid_constant__ MergeArguments arguments) {
  extern __shared__ __align__(16) unsigned char shared_memory[];
  Place* const places = reinterpret_cast<Place*>(shared_memory);
  const Call& call = arguments.call;
  const TileGroup& group = group_of(call.row_groups, call.num_sequences, blockIdx.x);
  const Sequence& whole = call.sequences[group.sequence];
  const Sequence sequence = used_sequence(call, group.sequence);
  const std::int64_t first = (blockIdx.x - group.first_tile) * arguments.rows_per_block;
  const auto rows = static_cast<int>(min(arguments.rows_per_block, whole.queries.size() - first));
  const std::int64_t position = whole.queries.begin + first;

  for (int i = static_cast<int>(threadIdx.x); i < rows * call.num_branches; i += kMergeThreads) {
    const std::int64_t p = position + i / call.num_branches;
    const TileGroup& of_branch =
        call.query_groups[i % call.num_branches * std::int64_t{call.num_sequences} +
                          group.sequence];
    places[i] = {-1, 0};
    if (p < sequence.queries.end) {
      const BranchShape& shape = call.branches[of_branch.branch];
      const BranchGeometry geometry(sequence.length, shape.segment, shape.dilation);
      const std::int64_t inside = p % geometry.segment;
      places[i] = {inside % geometry.dilation,
                   of_branch.row_begin +
                       geometry.slot(p / geometry.segment, inside / geometry.dilation) -
                       geometry.first_slot(sequence.queries.begin)};
    }
  }
  __syncthreads();

  const int pieces = call.head_dim / kWidth;
  const int items = rows * call.num_heads * pieces;
  for (int i = static_cast<int>(threadIdx.x); i < items; i += kMergeThreads) {
    const int column = i % pieces * kWidth;
    const int head = i / pieces % call.num_heads;
    const int row = i / pieces / call.num_heads;
    const auto saved = saved_rows(arguments.branch_out, sequence.batch, head);
    const float2* const sums =
        arguments.branch_sums + (sequence.batch * call.num_heads + head) * call.branch_rows;
    ScaledSum<float> state;
    float out[kWidth] = {};
    int covering = 0;
    for (int b = 0; b < call.num_branches; ++b) {
      const Place& place = places[row * call.num_branches + b];
      const int branch = call.query_groups[b * std::int64_t{call.num_sequences}].branch;
      const std::int64_t offset = call.offsets[std::int64_t{branch} * call.num_heads + head];
      if (offset < 0 || offset != place.residue) {
        continue;
      }
      ++covering;
      const float2 sum = sums[place.saved_row];
      const auto merged = merge_sums(state, ScaledSum<float>{sum.x, sum.y},
                                     [&](float x) { return call.units.power(x); });
      state = merged.total;
      const bool weighs = call.merge == Merge::kLse;
      const float older = weighs ? merged.first : 1.0f;
      const float newer = weighs ? merged.second : 1.0f;
      const float* const from = saved.row(place.saved_row) + column;
#pragma unroll
      for (int c = 0; c < kWidth; ++c) {
        out[c] = fmaf(newer, from[c], older * out[c]);
      }
    }
    float factor = call.out_scale;
    if (call.merge == Merge::kMean) {
      factor /= static_cast<float>(max(1, covering));
    }
    const std::int64_t at = whole.query_row + first + row;
    std::byte* const to = rows_of(arguments.out, sequence.batch, head).row(at);
#pragma unroll
    for (int c = 0; c < kWidth; ++c) {
      store_element(to, arguments.out.dtype, column + c, factor * out[c]);
    }
    if (column == 0) {
      const LogSum sum = call.units.log_sum(state);
      item_at(arguments.lse, sequence.batch, head, at) = sum.lse;
      if (arguments.lse_residual.defined()) {
        item_at(arguments.lse_residual, sequence.batch, head, at) = sum.residual;
      }
    }
  }
}

struct ClearArguments {
  TensorView branch_out;
  TensorView branch_lse;
};

/// Makes every saved row absent; rows that positions use are written afterwards.
__global__ void clear_saved_rows(const __grid_constant__ ClearArguments arguments) {
  const auto& shape = arguments.branch_out.shape;
  const std::int64_t rows = shape[0] * shape[1] * shape[2];
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const std::int64_t warps = std::int64_t{gridDim.x} * (blockDim.x / 32);
  for (std::int64_t i = std::int64_t{blockIdx.x} * (blockDim.x / 32) + threadIdx.x / 32; i < rows;
       i += warps) {
    const std::int64_t batch = i / (shape[1] * shape[2]);
    const std::int64_t head = i / shape[2] % shape[1];
    const std::int64_t row = i % shape[2];
    float* const out = saved_rows(arguments.branch_out, batch, head).row(row);
    for (int c = lane; c < shape[3]; c += 32) {
      out[c] = 0.0f;
    }
    if (lane < 2) {
      saved_rows(arguments.branch_lse, batch, head).row(row)[lane] =
          lane == 0 ? kAbsentLse<float> : 0.0f;
    }
  }
}

void run_sm80(const ForwardArguments& arguments, const CudaDecision& decision,
              cudaStream_t stream) {
  switch (arguments.query.dtype) {
    case DType::kBFloat16:
      return branches_forward<__nv_bfloat16>(arguments, decision, stream);
    case DType::kFloat16:
      return branches_forward<__half>(arguments, decision, stream);
    default:
      return branches_forward<float>(arguments, decision, stream);
  }
}

}  // namespace

void attention_forward(const Plan& plan, const ForwardTensors& tensors, const Context& context) {
  const Problem& problem = plan.problem();
  const auto& decision = static_cast<const CudaDecision&>(plan.decision());
  const cudaStream_t stream = stream_of(context);
  const DeviceGuard guard(problem.device.index);
  std::byte* const tickets = context.workspace.data() + decision.table_bytes;
  std::byte* const scratch = tickets + decision.tickets;

  ForwardArguments arguments{.call = begin_call(plan, tensors.masks, context),
                             .query = tensors.query,
                             .key = tensors.key,
                             .value = tensors.value,
                             .branch_out = tensors.branch_out,
                             .branch_lse = tensors.branch_lse,
                             .branch_sums = reinterpret_cast<float2*>(scratch)};
  if (tensors.branch_out.defined()) {
    launch(clear_saved_rows, {1024}, 256, 0, stream,
           ClearArguments{tensors.branch_out, tensors.branch_lse}, "forward: saved rows");
  } else {
    const std::int64_t row = problem.head_dim;
    const std::int64_t head = plan.branch_rows() * row;
    arguments.branch_out = {scratch + decision.branch_sums,
                            DType::kFloat32,
                            {problem.batch, problem.num_heads, plan.branch_rows(), row},
                            {problem.num_heads * head, head, row, 1}};
  }
  if (decision.not_sm90.empty()) {
    sm90::branches_forward({.call = arguments.call,
                            .tensors = &tensors,
                            .branch_out = arguments.branch_out,
                            .branch_sums = arguments.branch_sums,
                            .tickets = reinterpret_cast<int*>(tickets)},
                           plan, stream);
    if (decision.merges_in_dense) {
      return;
    }
  } else {
    run_sm80(arguments, decision, stream);
  }

  const TensorView& saved = arguments.branch_out;
  const MergeArguments merge{.call = arguments.call,
                             .rows_per_block = decision.merge_rows,
                             .branch_out = {saved.data, saved.dtype, saved.shape, saved.strides},
                             .branch_sums = arguments.branch_sums,
                             .out = tensors.out,
                             .lse = tensors.lse,
                             .lse_residual = tensors.lse_residual};
  const auto shared =
      static_cast<int>(decision.merge_rows * sizeof(Place) * problem.branches.size());
  launch(problem.head_dim % 4 == 0 ? merge_kernel<4> : merge_kernel<1>, {decision.row_tiles},
         kMergeThreads, shared, stream, merge, "forward: merge");
}

}  // namespace dilated::gpu
