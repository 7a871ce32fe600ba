// The definition of one row, in double precision (semantics §3 and §4): which keys a query sees in
// a branch, their probabilities, and what the branch contributes. Forward and backward are loops
// around `Row`.
#pragma once

#include <cmath>
#include <cstdint>
#include <span>
#include <vector>

#include "dilated/attention.h"

#include "src/geometry.h"
#include "src/masks.h"
#include "src/merge.h"

namespace dilated::reference {

template <typename Element>
const Element* row_at(const ConstTensorView& view, std::int64_t i, std::int64_t j, std::int64_t k) {
  return static_cast<const Element*>(view.data) + i * view.strides[0] + j * view.strides[1] +
         k * view.strides[2];
}

template <typename Element>
Element* row_at(const TensorView& view, std::int64_t i, std::int64_t j, std::int64_t k) {
  return static_cast<Element*>(view.data) + i * view.strides[0] + j * view.strides[1] +
         k * view.strides[2];
}

template <typename Element, typename Void>
auto& item_at(const StridedView<Void, 3>& view, std::int64_t i, std::int64_t j, std::int64_t k) {
  using Item = std::conditional_t<std::is_const_v<Void>, const Element, Element>;
  return static_cast<Item*>(
      view.data)[i * view.strides[0] + j * view.strides[1] + k * view.strides[2]];
}

template <typename Element>
double dot(const Element* a, const Element* b, std::int64_t d) {
  double sum = 0.0;
  for (std::int64_t c = 0; c < d; ++c) {
    sum += static_cast<double>(a[c]) * static_cast<double>(b[c]);
  }
  return sum;
}

/// One key that a row sees: its position in the sequence, its row in the tensors, its probability
/// e^(s - l_b), and that after dropout.
struct Term {
  std::int64_t position;
  std::int64_t row;
  double probability;
  double dropped;
};

/// One branch that covers the row.
struct BranchTerms {
  std::size_t branch;
  double lse;               // l_b
  std::vector<Term> terms;  // K_b(p)
  std::vector<double> out;  // O_b, after dropout
  double weight;            // of O_b in O / out_scale
};

/// Everything the definition says about one query row.
struct Row {
  double lse = kAbsentLse<double>;    // L
  std::vector<BranchTerms> branches;  // covering branches, in order
};

/// Evaluates rows of one problem; holds no state between rows.
template <typename Element>
class Definition {
 public:
  Definition(const Plan& plan, const ConstTensorView& query, const ConstTensorView& key,
             const ConstTensorView& value, const Masks& masks)
      : plan_(plan), query_(query), key_(key), value_(value), masks_(masks) {}

  std::int64_t kv_head(std::int64_t head) const {
    return head / plan_.problem().heads_per_kv_head();
  }

  /// The sequence as far as it is used.
  Sequence sequence(std::size_t index) const { return used_sequence(plan_, masks_, index); }

  /// Row at position `p` of the used part of a sequence.
  Row row(std::size_t sequence_index, std::int64_t head, std::int64_t p) const {
    const Problem& problem = plan_.problem();
    const Sequence sequence = this->sequence(sequence_index);
    Row row;
    for (std::size_t b = 0; b < problem.branches.size(); ++b) {
      const Branch& branch = problem.branches[b];
      const BranchGeometry geometry(sequence.length, branch.segment, branch.dilation);
      if (geometry.covers(p, branch.offsets[static_cast<std::size_t>(head)])) {
        row.branches.push_back(branch_terms(sequence_index, sequence, head, p, b, geometry));
        row.lse = merge_weights(row.lse, row.branches.back().lse).lse;
      }
    }
    for (BranchTerms& terms : row.branches) {
      terms.weight = merge_weight(row, terms.lse);
    }
    return row;
  }

 private:
  double merge_weight(const Row& row, double branch_lse) const {
    switch (plan_.problem().merge) {
      case Merge::kLse:
        return branch_lse == kAbsentLse<double> ? 0.0 : std::exp(branch_lse - row.lse);
      case Merge::kSum:
        return 1.0;
      case Merge::kMean:
        return 1.0 / static_cast<double>(row.branches.size());
    }
    return 0.0;
  }

  BranchTerms branch_terms(std::size_t sequence_index, const Sequence& sequence, std::int64_t head,
                           std::int64_t p, std::size_t b, const BranchGeometry& geometry) const {
    const Problem& problem = plan_.problem();
    const std::int64_t offset = problem.branches[b].offsets[static_cast<std::size_t>(head)];
    const std::int64_t segment = p / geometry.segment;
    const Element* q = row_at<Element>(query_, sequence.batch,
                                       sequence.query_row + p - sequence.queries.begin, head);
    BranchTerms result{b, kAbsentLse<double>, {}, {}, 0.0};

    double top = kAbsentLse<double>;
    const RowSpan keys = geometry.span(segment, offset, sequence.keys, sequence.key_row);
    const KeyFilter takes_part(masks_, sequence.batch);
    for (std::int64_t i = keys.first; i < keys.last; ++i) {
      const std::int64_t j = geometry.position(segment, offset, i);
      if ((problem.is_causal && j > p) || !takes_part(keys.row(i))) {
        continue;
      }
      const Element* k = row_at<Element>(key_, sequence.batch, keys.row(i), kv_head(head));
      const double score = plan_.scale() * dot(q, k, problem.head_dim);
      result.terms.push_back({j, keys.row(i), score, 0.0});
      top = std::max(top, score);
    }
    const std::int64_t phantoms = problem.tail == Tail::kPhantom && !problem.is_causal
                                      ? geometry.phantoms(segment, offset, sequence.keys)
                                      : 0;
    if (phantoms > 0) {
      top = std::max(top, 0.0);
    }
    result.out.assign(static_cast<std::size_t>(problem.head_dim), 0.0);
    if (result.terms.empty() && phantoms == 0) {
      return result;
    }
    // Without phantoms e^-top may overflow (top below -709) and 0 * inf must not appear.
    double sum = phantoms > 0 ? static_cast<double>(phantoms) * std::exp(-top) : 0.0;
    for (const Term& term : result.terms) {
      sum += std::exp(term.probability - top);
    }
    result.lse = top + std::log(sum);

    for (Term& term : result.terms) {
      term.probability = std::exp(term.probability - result.lse);
      term.dropped = term.probability;
      if (problem.dropout_p > 0.0) {
        term.dropped *= dropout_of(problem, masks_, sequence_index, head, b)(p, term.position);
      }
      const Element* v = row_at<Element>(value_, sequence.batch, term.row, kv_head(head));
      for (std::size_t c = 0; c < result.out.size(); ++c) {
        result.out[c] += term.dropped * static_cast<double>(v[c]);
      }
    }
    return result;
  }

  const Plan& plan_;
  const ConstTensorView& query_;
  const ConstTensorView& key_;
  const ConstTensorView& value_;
  const Masks& masks_;
};

/// Runs `body.template operator()<Element>()` for the element type of a problem (float32 or
/// float64).
template <typename Body>
void with_element(DType dtype, const Body& body) {
  if (dtype == DType::kFloat64) {
    body.template operator()<double>();
  } else {
    body.template operator()<float>();
  }
}

}  // namespace dilated::reference
