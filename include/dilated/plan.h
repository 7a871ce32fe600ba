// What was decided: a Problem that passed validation, the back end that runs it with its Decision,
// and derived sizes.
// Immutable after `make_plan`; share it between threads freely.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "dilated/class_rows.h"
#include "dilated/decision.h"
#include "dilated/problem.h"

namespace dilated {

struct Backend;  // src/backend_table.h

/// One sequence: `length` positions, of which a call holds query rows at `queries` and key rows at
/// `keys`. Position queries.begin is row `query_row` of batch element `batch`; keys alike.
struct Sequence {
  std::int64_t batch = 0;
  std::int64_t length = 0;
  Range queries;
  Range keys;
  std::int64_t query_row = 0;
  std::int64_t key_row = 0;

  /// The same sequence if only its first `used` positions exist (seqused).
  constexpr Sequence cut(std::int64_t used) const {
    Sequence result = *this;
    result.length = std::max(std::int64_t{0}, std::min(length, used));
    result.queries = queries.below(result.length);
    result.keys = keys.below(result.length);
    return result;
  }
};

class Plan {
 public:
  const Problem& problem() const { return problem_; }
  std::string_view backend_name() const;
  const Backend& backend() const { return *backend_; }
  const Decision& decision() const { return *decision_; }
  /// problem().scale, resolved.
  double scale() const { return scale_; }
  /// Non-empty and empty sequences alike, in order: one per batch element, or as cu_seqlens has
  /// them.
  const std::vector<Sequence>& sequences() const { return sequences_; }

  /// True when backward needs (O_b, l_b) of every branch: merge sum or mean, or detached merge
  /// weights, and some head runs more than one branch.
  bool needs_branch_outputs() const { return needs_branch_outputs_; }
  /// Rows per (batch, head) of `branch_out` and `branch_lse`:
  ///   sum over branches of min(m, m / dilation + m / segment + extra)
  /// with m = query_rows(), integer division, and extra = S + 1, or 3 S with windows, for S
  /// sequences (S = 1 when not packed).
  std::int64_t branch_rows() const { return branch_rows_; }
  /// First row of branch b, sequence s in `branch_out`. Row i of segment t of that sequence lies
  /// geometry.slot(t, i) - geometry.first_slot(queries.begin) rows further on.
  std::int64_t branch_row_begin(std::size_t branch, std::size_t sequence) const;

  /// Class rows of every branch; empty unless the problem's keys come by class rows.
  const std::vector<ClassRows>& class_rows() const { return class_rows_; }
  /// Rows of `class_key` and `class_value`.
  std::int64_t class_row_count() const { return class_row_count_; }
  /// The class rows of one segment; null if its keys lie in `key` and `value`.
  const PartialSegment* partial_segment(std::size_t branch, std::size_t sequence,
                                        std::int64_t segment) const;

  /// Bytes of scratch memory that forward or backward uses.
  std::int64_t workspace_bytes(Pass pass) const { return decision_->workspace_bytes(pass); }

  /// Several lines: problem, back end, its decision, derived sizes.
  std::string to_string() const;

 private:
  friend Plan make_plan(const Problem& problem, std::string_view backend);
  Plan() = default;

  Problem problem_;
  const Backend* backend_ = nullptr;
  std::shared_ptr<const Decision> decision_;
  double scale_ = 0.0;
  std::vector<Sequence> sequences_;
  bool needs_branch_outputs_ = false;
  std::int64_t branch_rows_ = 0;
  std::vector<std::int64_t> branch_row_begin_;  // (branches, sequences)
  std::vector<ClassRows> class_rows_;
  std::int64_t class_row_count_ = 0;
};

/// Validates and decides. `backend` forces a back end by name; empty: the environment variable
/// DILATED_BACKEND if set, else the first that supports the problem.
/// Throws InvalidProblem, or Unsupported with every back end's reason.
Plan make_plan(const Problem& problem, std::string_view backend = {});

}  // namespace dilated
