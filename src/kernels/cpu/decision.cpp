// Block sizes and scratch of the CPU back end.
#include "src/kernels/cpu/decision.h"

#include <algorithm>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "dilated/parallel_for.h"

#include "src/branches.h"
#include "src/kernels/cpu/scratch.h"

namespace dilated::cpu {
namespace {

/// Whole tiles of rows; at least one.
std::int64_t whole_tiles(std::int64_t rows) {
  return round_up(std::max<std::int64_t>(rows, 1), kTileLanes);
}

}  // namespace

CpuDecision::CpuDecision(const Problem& problem)
    : threads(problem.device.units > 0 ? problem.device.units
                                       : default_parallel_for().num_threads()),
      branch_order(ascending_branches(problem)) {
  const std::int64_t d = problem.head_dim;
  const std::int64_t rows = problem.query_rows();
  const std::int64_t share = problem.batch * rows * problem.num_heads / (32 * threads);
  forward_block =
      whole_tiles(std::min({std::max<std::int64_t>(share, 256), std::int64_t{4096}, rows}));
  forward_chunk = std::min({std::max<std::int64_t>(98304 / d / kTileLanes, 2) * kTileLanes,
                            std::int64_t{2048}, whole_tiles(rows)});
  backward_chunk = std::min({std::max<std::int64_t>(65536 / d / kBackwardRows, 1) * kBackwardRows,
                             std::int64_t{1024}, whole_tiles(rows)});
  forward_scratch = scratch_bytes<ForwardScratch>(forward_block, forward_chunk, d);
  backward_scratch = scratch_bytes<BackwardScratch>(backward_chunk, d);
  gradients = problem.dtype == DType::kFloat32
                  ? 0
                  : problem.batch * d *
                        (rows * problem.num_heads + 2 * problem.key_rows() * problem.num_kv_heads) *
                        static_cast<std::int64_t>(sizeof(float));
}

std::int64_t CpuDecision::workspace_bytes(Pass pass) const {
  return pass == Pass::kForward ? threads * forward_scratch
                                : threads * backward_scratch + gradients;
}

std::string CpuDecision::to_string() const {
  return fmt::format(
      "threads       {}\nbranch order  [{}]\nforward       items of {} positions, {} rows of a "
      "class at a time\nbackward      {} rows of a class at a time\n",
      threads, fmt::join(branch_order, ", "), forward_block, forward_chunk, backward_chunk);
}

}  // namespace dilated::cpu
