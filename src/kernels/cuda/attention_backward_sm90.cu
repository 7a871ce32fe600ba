// Launches of the Hopper backward: two for all sparse branches and two for the dense one that
// merges them, or two per branch.
#include "src/kernels/cuda/attention_backward_sm90.cuh"

namespace dilated::gpu::sm90 {
namespace {

/// Branches of ranks [first, last).
GradientArguments arguments_of(const gpu::BackwardArguments& all, const GradientParts& parts,
                               const Plan& plan, std::size_t first, std::size_t last) {
  const Call& call = all.call;
  const auto& decision = static_cast<const CudaDecision&>(plan.decision());
  // Rows of a dense branch that comes first are left out.
  const std::int64_t left_out = plan.branch_rows() - decision.part_rows;
  const auto gradient = [&](const TensorView& result, float* memory, float scale) {
    return Gradient{.result = result,
                    .parts = memory == nullptr ? nullptr : memory - left_out * call.head_dim,
                    .heads = result.shape[2],
                    .scale = scale};
  };
  return {.call = call,
          .maps = {},
          .range = {},
          .row_numbers = all.row_numbers,
          .query = all.query,
          .dout = all.dout,
          .key = all.key,
          .merges = parts.dquery != nullptr && first == 0,
          .part_rows = decision.part_rows,
          .dquery = gradient(all.dquery, parts.dquery, call.scale),
          .dkey = gradient(all.dkey, parts.dkey, call.scale),
          .dvalue = gradient(all.dvalue, parts.dvalue, call.out_scale)};
}

}  // namespace

void branches_backward(const gpu::BackwardArguments& all, const GradientParts& parts,
                       const Plan& plan, int* tickets, cudaStream_t stream) {
  const Problem& problem = plan.problem();
  const auto& decision = static_cast<const CudaDecision&>(plan.decision());
  const std::size_t branches = decision.branch_order.size();
  check(cudaMemsetAsync(tickets, 0, 2 * branches * sizeof(int), stream), "backward: tickets");
  const auto run = [&](std::size_t first, std::size_t last) {
    const auto launch = [&](int query_rows, const TileGroup* groups,
                            const std::vector<std::int64_t>& tiles, int* ticket,
                            const auto& launches) {
      GradientArguments arguments = arguments_of(all, parts, plan, first, last);
      const auto sequences = static_cast<std::size_t>(all.call.num_sequences);
      arguments.range = {.groups = groups + first * sequences,
                         .num_groups = static_cast<int>((last - first) * sequences),
                         .first_tile = tiles[first],
                         .num_tiles = (tiles[last] - tiles[first]) * problem.num_heads,
                         .ticket = ticket};
      for (std::size_t rank = first; rank < last; ++rank) {
        const std::size_t branch = decision.branch_order[rank];
        const auto maps = [&](const ConstTensorView& view, int rows) {
          return dilated_maps(row_tensor(view), problem.branches[branch].dilation,
                              {.box_rows = static_cast<std::uint32_t>(rows)});
        };
        arguments.maps[branch] = {maps(all.query, query_rows), maps(all.dout, query_rows),
                                  maps(all.key, kBackwardRows), maps(all.value, kBackwardRows)};
      }
      launches(arguments, stream);
    };
    const bool is_bfloat16 = problem.dtype == DType::kBFloat16;
    launch(kBackwardRows, all.call.backward_query_groups, decision.backward_query_tiles,
           tickets + 2 * first,
           is_bfloat16 ? run_gradient<QueryGradient, __nv_bfloat16>
                       : run_gradient<QueryGradient, __half>);
    launch(
        key_gradient_queries(static_cast<int>(problem.head_dim)), all.call.backward_key_groups,
        decision.backward_key_tiles, tickets + 2 * first + 1,
        is_bfloat16 ? run_gradient<KeyGradient, __nv_bfloat16> : run_gradient<KeyGradient, __half>);
  };
  if (parts.dquery != nullptr) {
    run(1, branches);
    run(0, 1);
    return;
  }
  for (std::size_t rank = branches; rank-- > 0;) {
    run(rank, rank + 1);
  }
}

}  // namespace dilated::gpu::sm90
