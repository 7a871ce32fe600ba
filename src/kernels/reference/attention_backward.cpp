// Backward by definition (semantics §6, general rule), row by row from the recomputed forward:
//   dS = p (dO_b.v - dO_b.O_b + dl_b),  dv += p dO_b,  dq += scale dS k,  dk += scale dS q
// with dO_b = w_b g and dl_b = [w_b (D_b - D), exact lse only] + e^(l_b - L) dL.
#include <algorithm>
#include <type_traits>

#include "src/hand_out.h"
#include "src/kernels/reference/attention.h"
#include "src/kernels/reference/definition.h"

namespace dilated::reference {
namespace {

/// Gradients of one key/value head of one sequence, accumulated in double, (key rows, head_dim)
/// each.
struct HeadGradients {
  double* dkey;
  double* dvalue;
};

template <typename Element>
void add_row(const Plan& plan, const BackwardTensors& tensors,
             const Definition<Element>& definition, std::size_t sequence_index, std::int64_t head,
             std::int64_t position, const Row& row, const HeadGradients& gradients) {
  const Problem& problem = plan.problem();
  const Sequence& sequence = plan.sequences()[sequence_index];
  const std::int64_t d = problem.head_dim;
  const Element* q = row_at<Element>(tensors.query, sequence.batch, position, head);
  const Element* dout = row_at<Element>(tensors.dout, sequence.batch, position, head);
  Element* dquery = row_at<Element>(tensors.dquery, sequence.batch, position, head);
  const double dlse =
      tensors.dlse.defined()
          ? static_cast<double>(item_at<Element>(tensors.dlse, sequence.batch, head, position))
          : 0.0;
  std::vector<double> dq(static_cast<std::size_t>(d), 0.0);
  const auto upstream = [&](std::int64_t c) {
    return problem.out_scale * static_cast<double>(dout[c]);
  };
  const auto dot_upstream = [&](const auto* x) {
    double sum = 0.0;
    for (std::int64_t c = 0; c < d; ++c) {
      sum += upstream(c) * static_cast<double>(x[c]);
    }
    return sum;
  };
  double merged = 0.0;  // D = g . O / out_scale
  for (const BranchTerms& terms : row.branches) {
    merged += terms.weight * dot_upstream(terms.out.data());
  }
  for (const BranchTerms& terms : row.branches) {
    if (terms.lse == kAbsentLse<double>) {
      continue;
    }
    const double branch_delta = dot_upstream(terms.out.data());  // D_b = g . O_b
    double dlse_b = std::exp(terms.lse - row.lse) * dlse;
    if (problem.merge == Merge::kLse && problem.lse_grad) {
      dlse_b += terms.weight * (branch_delta - merged);
    }
    for (const Term& term : terms.terms) {
      const Element* k = definition.key(sequence, terms.keys, term.row);
      const Element* v = definition.value(sequence, terms.keys, term.row);
      const double dscore =
          plan.scale() * (term.dropped * terms.weight * dot_upstream(v) -
                          term.probability * (terms.weight * branch_delta - dlse_b));
      const auto add_to = [&](auto* dk, auto* dv) {
        using Sum = std::remove_pointer_t<decltype(dk)>;
        for (std::int64_t c = 0; c < d; ++c) {
          dq[static_cast<std::size_t>(c)] += dscore * static_cast<double>(k[c]);
          dk[c] += static_cast<Sum>(dscore * static_cast<double>(q[c]));
          dv[c] += static_cast<Sum>(term.dropped * terms.weight * upstream(c));
        }
      };
      if (terms.keys.are_class_rows) {
        add_to(row_at<Element>(tensors.dclass_key, sequence.batch, term.row, 0),
               row_at<Element>(tensors.dclass_value, sequence.batch, term.row, 0));
      } else {
        add_to(gradients.dkey + (term.row - sequence.key_row) * d,
               gradients.dvalue + (term.row - sequence.key_row) * d);
      }
    }
  }
  for (std::int64_t c = 0; c < d; ++c) {
    dquery[c] = static_cast<Element>(dq[static_cast<std::size_t>(c)]);
  }
}

template <typename Element>
void clear(const TensorView& view, Element zero) {
  for (std::int64_t b = 0; view.defined() && b < view.shape[0]; ++b) {
    for (std::int64_t row = 0; row < view.shape[1]; ++row) {
      std::fill_n(row_at<Element>(view, b, row, 0), view.shape[3], zero);
    }
  }
}

}  // namespace

std::int64_t backward_doubles(const Plan& plan) {
  std::int64_t longest = 0;
  for (const Sequence& sequence : plan.sequences()) {
    longest = std::max(longest, sequence.keys.size());
  }
  return 2 * longest * plan.problem().head_dim;
}

void attention_backward(const Plan& plan, const BackwardTensors& tensors, const Context& context) {
  const Problem& problem = plan.problem();
  const auto sequences = static_cast<std::int64_t>(plan.sequences().size());
  const std::int64_t group = problem.num_kv_heads > 0 ? problem.heads_per_kv_head() : 0;
  const std::int64_t d = problem.head_dim;
  with_element(problem.dtype, [&]<typename Element>() {
    const Definition<Element> definition(plan, tensors);
    clear(tensors.dclass_key, Element(0));
    clear(tensors.dclass_value, Element(0));
    const auto one_head = [&](std::size_t s, std::int64_t kv_head, double* scratch) {
      const Sequence& sequence = plan.sequences()[s];
      const std::int64_t keys = sequence.keys.size();
      const std::int64_t used_end = definition.sequence(s).queries.end;
      const HeadGradients gradients{scratch, scratch + keys * d};
      std::fill_n(scratch, 2 * keys * d, 0.0);
      for (std::int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
        for (std::int64_t p = sequence.queries.begin; p < sequence.queries.end; ++p) {
          add_row<Element>(plan, tensors, definition, s, head,
                           sequence.query_row + p - sequence.queries.begin,
                           p < used_end ? definition.row(s, head, p) : Row{}, gradients);
        }
      }
      for (std::int64_t row = 0; row < keys; ++row) {
        Element* dkey =
            row_at<Element>(tensors.dkey, sequence.batch, sequence.key_row + row, kv_head);
        Element* dvalue =
            row_at<Element>(tensors.dvalue, sequence.batch, sequence.key_row + row, kv_head);
        for (std::int64_t c = 0; c < d; ++c) {
          dkey[c] = static_cast<Element>(gradients.dkey[row * d + c]);
          dvalue[c] = static_cast<Element>(gradients.dvalue[row * d + c]);
        }
      }
    };
    hand_out(*context.parallel_for, sequences * problem.num_kv_heads,
             [&](std::int64_t begin, std::int64_t end, int thread) {
               double* scratch = reinterpret_cast<double*>(context.workspace.data()) +
                                 static_cast<std::int64_t>(thread) * backward_doubles(plan);
               for (std::int64_t item = begin; item < end; ++item) {
                 one_head(static_cast<std::size_t>(item / problem.num_kv_heads),
                          item % problem.num_kv_heads, scratch);
               }
             });
  });
}

}  // namespace dilated::reference
