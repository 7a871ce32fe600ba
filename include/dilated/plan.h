// What was decided: a Problem that passed validation, the back end that runs it, and derived sizes.
// Immutable after `make_plan`; share it between threads freely.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "dilated/problem.h"

namespace dilated {

struct Backend;  // src/backend_table.h

enum class Pass { kForward, kBackward };

/// One sequence: rows [start, start + length) of batch element `batch`.
struct Sequence {
  std::int64_t batch = 0;
  std::int64_t start = 0;
  std::int64_t length = 0;
};

class Plan {
 public:
  const Problem& problem() const { return problem_; }
  std::string_view backend_name() const;
  const Backend& backend() const { return *backend_; }
  /// problem().scale, resolved.
  double scale() const { return scale_; }
  /// Non-empty and empty sequences alike, in order: one per batch element, or as cu_seqlens has
  /// them.
  const std::vector<Sequence>& sequences() const { return sequences_; }

  /// True when backward needs (O_b, l_b) of every branch: merge sum or mean, or detached merge
  /// weights, and some head runs more than one branch.
  bool needs_branch_outputs() const { return needs_branch_outputs_; }
  /// Rows per (batch, head) of `branch_out` and `branch_lse`:
  ///   sum over branches of min(n, n / dilation + n / segment + number of sequences + 1)
  /// with n = seqlen, integer division, number of sequences = 1 when not packed. 0 if not needed.
  std::int64_t branch_rows() const { return branch_rows_; }
  /// First row of branch b, sequence s in `branch_out`. Row i of segment t of that sequence lies
  /// t * ceil(w_e / r) + i rows further on.
  std::int64_t branch_row_begin(std::size_t branch, std::size_t sequence) const;

  /// Bytes of scratch memory that forward or backward uses on at most `threads` threads. The
  /// formula is documented in docs/architecture.md.
  std::int64_t workspace_bytes(Pass pass, int threads) const;

  /// Several lines: problem, back end, derived sizes.
  std::string to_string() const;

 private:
  friend Plan make_plan(const Problem& problem, std::string_view backend);
  Plan() = default;

  Problem problem_;
  const Backend* backend_ = nullptr;
  double scale_ = 0.0;
  std::vector<Sequence> sequences_;
  bool needs_branch_outputs_ = false;
  std::int64_t branch_rows_ = 0;
  std::vector<std::int64_t> branch_row_begin_;  // (branches, sequences)
};

/// Validates and decides. `backend` forces a back end by name; empty: the environment variable
/// DILATED_BACKEND if set, else the first that supports the problem.
/// Throws InvalidProblem, or Unsupported with every back end's reason.
Plan make_plan(const Problem& problem, std::string_view backend = {});

}  // namespace dilated
