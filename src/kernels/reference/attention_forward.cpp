// Forward by definition (semantics §4): O = out_scale * sum_b w_b O_b, L = log sum_b e^(l_b).
#include "src/hand_out.h"
#include "src/kernels/reference/attention.h"
#include "src/kernels/reference/definition.h"

namespace dilated::reference {
namespace {

template <typename Element>
class Forward {
 public:
  Forward(const Plan& plan, const ForwardTensors& tensors)
      : plan_(plan), problem_(plan.problem()), tensors_(tensors), definition_(plan, tensors) {}

  /// Row `at` of the query tensor's part that belongs to one sequence.
  void write(std::size_t sequence_index, std::int64_t head, std::int64_t at) const {
    const Sequence sequence = definition_.sequence(sequence_index);
    const std::int64_t p = sequence.queries.begin + at;
    Row row;  // absent, if beyond the used length
    if (p < sequence.queries.end) {
      row = definition_.row(sequence_index, head, p);
    }
    Element* out = row_at<Element>(tensors_.out, sequence.batch, sequence.query_row + at, head);
    for (std::int64_t c = 0; c < problem_.head_dim; ++c) {
      double sum = 0.0;
      for (const BranchTerms& terms : row.branches) {
        sum += terms.weight * terms.out[static_cast<std::size_t>(c)];
      }
      out[c] = static_cast<Element>(problem_.out_scale * sum);
    }
    item_at<Element>(tensors_.lse, sequence.batch, head, sequence.query_row + at) =
        static_cast<Element>(row.lse);
    if (tensors_.lse_residual.defined()) {  // backward recomputes everything in double
      item_at<Element>(tensors_.lse_residual, sequence.batch, head, sequence.query_row + at) =
          Element(0);
    }
    if (tensors_.branch_out.defined()) {
      save_branches(sequence_index, sequence, head, p, row);
    }
  }

  /// Makes every saved row of one head absent.
  void clear_branches(std::int64_t batch, std::int64_t head) const {
    for (std::int64_t row = 0; row < plan_.branch_rows(); ++row) {
      std::fill_n(row_at<Element>(tensors_.branch_out, batch, head, row), problem_.head_dim,
                  Element(0));
      save_lse(batch, head, row, kAbsentLse<Element>);
    }
  }

 private:
  void save_branches(std::size_t sequence_index, const Sequence& sequence, std::int64_t head,
                     std::int64_t p, const Row& row) const {
    for (const BranchTerms& terms : row.branches) {
      const Branch& branch = problem_.branches[terms.branch];
      const BranchGeometry geometry(sequence.length, branch.segment, branch.dilation);
      const std::int64_t slot = plan_.branch_row_begin(terms.branch, sequence_index) +
                                geometry.slot(p / geometry.segment, geometry.row_of(p)) -
                                geometry.first_slot(sequence.queries.begin);
      Element* branch_out = row_at<Element>(tensors_.branch_out, sequence.batch, head, slot);
      for (std::size_t c = 0; c < terms.out.size(); ++c) {
        branch_out[c] = static_cast<Element>(terms.out[c]);
      }
      save_lse(sequence.batch, head, slot, static_cast<Element>(terms.lse));
    }
  }

  void save_lse(std::int64_t batch, std::int64_t head, std::int64_t row, Element lse) const {
    Element* const pair = row_at<Element>(tensors_.branch_lse, batch, head, row);
    pair[0] = lse;
    pair[1] = Element(0);
  }

  const Plan& plan_;
  const Problem& problem_;
  const ForwardTensors& tensors_;
  Definition<Element> definition_;
};

}  // namespace

void attention_forward(const Plan& plan, const ForwardTensors& tensors, const Context& context) {
  const Problem& problem = plan.problem();
  with_element(problem.dtype, [&]<typename Element>() {
    const Forward<Element> pass(plan, tensors);
    if (tensors.branch_out.defined()) {
      hand_out(*context.parallel_for, problem.batch * problem.num_heads,
               [&](std::int64_t begin, std::int64_t end, int /*thread*/) {
                 for (std::int64_t item = begin; item < end; ++item) {
                   pass.clear_branches(item / problem.num_heads, item % problem.num_heads);
                 }
               });
    }
    for (std::size_t s = 0; s < plan.sequences().size(); ++s) {
      const std::int64_t rows = plan.sequences()[s].queries.size();
      hand_out(*context.parallel_for, problem.num_heads * rows,
               [&](std::int64_t begin, std::int64_t end, int /*thread*/) {
                 for (std::int64_t item = begin; item < end; ++item) {
                   pass.write(s, item / rows, item % rows);
                 }
               });
    }
  });
}

}  // namespace dilated::reference
