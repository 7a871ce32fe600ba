// Launches of the Hopper forward: tensor maps of all branches; then all branches, or the sparse
// ones and the dense one that merges them.
#include "src/kernels/cuda/attention_forward_sm90.cuh"

namespace dilated::gpu::sm90 {
bool has_kernels() { return true; }

void branches_forward(const ForwardCall& call, const Plan& plan, cudaStream_t stream) {
  const Problem& problem = plan.problem();
  const auto& decision = static_cast<const CudaDecision&>(plan.decision());
  const ForwardTensors& tensors = *call.tensors;
  const MapOptions query_box = {
      .box_rows = static_cast<std::uint32_t>(forward_rows(decision.hopper_head_dim))};
  const MapOptions key_box = {.box_rows = kForwardKeys};
  const auto run = [&](std::size_t first_rank, std::size_t last_rank, bool merges, int* ticket) {
    const auto sequences = static_cast<std::size_t>(call.call.num_sequences);
    ForwardArguments arguments{
        .call = call.call,
        .maps = {},
        .range = {.groups = call.call.forward_groups + first_rank * sequences,
                  .num_groups = static_cast<int>((last_rank - first_rank) * sequences),
                  .first_tile = decision.forward_tiles[first_rank],
                  .num_tiles =
                      (decision.forward_tiles[last_rank] - decision.forward_tiles[first_rank]) *
                      problem.num_heads,
                  .ticket = ticket},
        .value = tensors.value,
        .branch_out = call.branch_out,
        .branch_lse = tensors.branch_lse,
        .branch_sums = call.branch_sums,
        .out = tensors.out,
        .lse = tensors.lse,
        .lse_residual = tensors.lse_residual};
    for (std::size_t rank = first_rank; rank < last_rank; ++rank) {
      const std::size_t branch = decision.branch_order[rank];
      const std::int64_t dilation = problem.branches[branch].dilation;
      arguments.maps[branch] = {dilated_maps(row_tensor(tensors.query), dilation, query_box),
                                dilated_maps(row_tensor(tensors.key), dilation, key_box),
                                dilated_maps(row_tensor(tensors.value), dilation, key_box)};
    }
    const auto launches =
        problem.dtype == DType::kBFloat16 ? run_forward<__nv_bfloat16> : run_forward<__half>;
    launches(arguments, merges, stream);
  };
  const std::size_t branches = problem.branches.size();
  check(cudaMemsetAsync(call.tickets, 0, 2 * sizeof(int), stream), "forward: tickets");
  if (decision.merges_in_dense) {
    run(1, branches, false, call.tickets);
    run(0, 1, true, call.tickets + 1);
  } else {
    run(0, branches, false, call.tickets);
  }
}

}  // namespace dilated::gpu::sm90
