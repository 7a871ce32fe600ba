// Launches of the Hopper backward: two per branch.
#include "src/kernels/cuda/attention_backward_sm90.cuh"

namespace dilated::gpu::sm90 {

void branches_backward(const gpu::BackwardArguments& all, const Plan& plan, int* tickets,
                       cudaStream_t stream) {
  const Call& call = all.call;
  const Problem& problem = plan.problem();
  const auto& decision = static_cast<const CudaDecision&>(plan.decision());
  const int multiprocessors = count_multiprocessors();
  const std::size_t branches = decision.branch_order.size();
  check(cudaMemsetAsync(tickets, 0, 2 * branches * sizeof(int), stream), "backward: tickets");
  for (std::size_t rank = branches; rank-- > 0;) {
    const std::int64_t dilation = problem.branches[decision.branch_order[rank]].dilation;
    const auto sequences = static_cast<std::size_t>(call.num_sequences);
    const auto arguments = [&](int query_rows, int key_rows, const TileGroup* groups,
                               const std::vector<std::int64_t>& tiles, int* ticket) {
      const auto maps = [&](const ConstTensorView& view, int rows) {
        return dilated_maps(row_tensor(view), dilation,
                            {.box_rows = static_cast<std::uint32_t>(rows)});
      };
      return GradientArguments{
          .call = call,
          .query = maps(all.query, query_rows),
          .dout = maps(all.dout, query_rows),
          .key = maps(all.key, key_rows),
          .value = maps(all.value, key_rows),
          .range = {.groups = groups + rank * sequences,
                    .num_groups = call.num_sequences,
                    .first_tile = tiles[rank],
                    .num_tiles = (tiles[rank + 1] - tiles[rank]) * call.num_heads,
                    .ticket = ticket},
          .row_numbers = all.row_numbers,
          .dout_rows = all.dout,
          .dquery = all.dquery,
          .dkey = all.dkey,
          .dvalue = all.dvalue};
    };
    const auto run =
        problem.dtype == DType::kBFloat16 ? run_gradients<__nv_bfloat16> : run_gradients<__half>;
    run(arguments(kBackwardRows, kBackwardRows, call.backward_query_groups,
                  decision.backward_query_tiles, tickets + 2 * rank),
        arguments(key_gradient_queries(call.head_dim), kBackwardRows, call.backward_key_groups,
                  decision.backward_key_tiles, tickets + 2 * rank + 1),
        multiprocessors, stream);
  }
}

}  // namespace dilated::gpu::sm90
