// Forward by definition (semantics §4): O = out_scale * sum_b w_b O_b, L = log sum_b e^(l_b).
#include "src/kernels/reference/attention.h"
#include "src/kernels/reference/definition.h"

namespace dilated::reference {
namespace {

template <typename Element>
void write_row(const Plan& plan, const ForwardTensors& tensors, std::size_t sequence_index,
               std::int64_t head, std::int64_t p, const Row& row) {
  const Problem& problem = plan.problem();
  const Sequence& sequence = plan.sequences()[sequence_index];
  Element* out = row_at<Element>(tensors.out, sequence.batch, sequence.start + p, head);
  for (std::int64_t c = 0; c < problem.head_dim; ++c) {
    double sum = 0.0;
    for (const BranchTerms& terms : row.branches) {
      sum += terms.weight * terms.out[static_cast<std::size_t>(c)];
    }
    out[c] = static_cast<Element>(problem.out_scale * sum);
  }
  item_at<Element>(tensors.lse, sequence.batch, head, sequence.start + p) =
      static_cast<Element>(row.lse);
  if (!tensors.branch_out.defined() || !plan.needs_branch_outputs()) {
    return;
  }
  for (const BranchTerms& terms : row.branches) {
    const Branch& branch = problem.branches[terms.branch];
    const BranchGeometry geometry(sequence.length, branch.segment, branch.dilation);
    const std::int64_t compact = plan.branch_row_begin(terms.branch, sequence_index) +
                                 p / geometry.segment * geometry.slots() + geometry.row_of(p);
    Element* branch_out = row_at<Element>(tensors.branch_out, sequence.batch, head, compact);
    for (std::size_t c = 0; c < terms.out.size(); ++c) {
      branch_out[c] = static_cast<Element>(terms.out[c]);
    }
    item_at<Element>(tensors.branch_lse, sequence.batch, head, compact) =
        static_cast<Element>(terms.lse);
  }
}

}  // namespace

void attention_forward(const Plan& plan, const ForwardTensors& tensors, const Context& context) {
  const Problem& problem = plan.problem();
  with_element(problem.dtype, [&]<typename Element>() {
    const Definition<Element> definition(plan, tensors.query, tensors.key, tensors.value,
                                         tensors.masks);
    for (std::size_t s = 0; s < plan.sequences().size(); ++s) {
      const std::int64_t length = plan.sequences()[s].length;
      context.parallel_for->run(
          problem.num_heads * length, [&](std::int64_t begin, std::int64_t end, int /*thread*/) {
            for (std::int64_t item = begin; item < end; ++item) {
              const std::int64_t head = item / length;
              const std::int64_t p = item % length;
              write_row<Element>(plan, tensors, s, head, p, definition.row(s, head, p));
            }
          });
    }
  });
}

}  // namespace dilated::reference
