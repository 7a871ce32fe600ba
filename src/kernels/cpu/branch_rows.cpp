// Clears the rows of saved branch results that no position uses.
#include "src/kernels/cpu/branch_rows.h"

#include <algorithm>
#include <limits>

#include "src/geometry.h"
#include "src/hand_out.h"
#include "src/kernels/cpu/addressing.h"
#include "src/masks.h"

namespace dilated::cpu {
namespace {

/// Those of one (batch, head).
void clear_unused_rows(const Plan& plan, const ForwardTensors& tensors, std::int64_t batch,
                       std::int64_t head) {
  const Problem& problem = plan.problem();
  const auto clear = [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t row = first; row < last; ++row) {
      std::fill_n(saved_row(tensors.branch_out, batch, head, row), problem.head_dim, 0.0f);
      float* const pair = saved_row(tensors.branch_lse, batch, head, row);
      pair[0] = -std::numeric_limits<float>::infinity();
      pair[1] = 0.0f;
    }
  };
  const std::size_t sequences = plan.sequences().size();
  const bool packed = !problem.cu_seqlens.empty();
  std::int64_t next = 0;  // rows before it are written
  for (std::size_t b = 0; b < problem.branches.size(); ++b) {
    const Branch& branch = problem.branches[b];
    const std::int64_t offset = branch.offsets[static_cast<std::size_t>(head)];
    const auto first = packed ? std::size_t{0} : static_cast<std::size_t>(batch);
    for (std::size_t s = first; s < (packed ? sequences : first + 1) && offset >= 0; ++s) {
      const Sequence sequence = used_sequence(plan, tensors.masks, s);
      if (sequence.queries.size() == 0) {
        continue;
      }
      const BranchGeometry geometry(sequence.length, branch.segment, branch.dilation);
      const std::int64_t origin =
          plan.branch_row_begin(b, s) - geometry.first_slot(sequence.queries.begin);
      for (std::int64_t segment = sequence.queries.begin / geometry.segment;
           segment <= (sequence.queries.end - 1) / geometry.segment; ++segment) {
        const RowSpan rows = geometry.span(segment, offset, sequence.queries, 0);
        if (!rows.empty()) {
          clear(next, origin + geometry.slot(segment, rows.first));
          next = origin + geometry.slot(segment, rows.last);
        }
      }
    }
  }
  clear(next, plan.branch_rows());
}

}  // namespace

void clear_unused_branch_rows(const Plan& plan, const ForwardTensors& tensors,
                              const ParallelFor& threads) {
  if (!tensors.branch_out.defined()) {
    return;
  }
  const Problem& problem = plan.problem();
  hand_out(threads, problem.batch * problem.num_heads,
           [&](std::int64_t begin, std::int64_t end, int /*thread*/) {
             for (std::int64_t i = begin; i < end; ++i) {
               clear_unused_rows(plan, tensors, i / problem.num_heads, i % problem.num_heads);
             }
           });
}

}  // namespace dilated::cpu
