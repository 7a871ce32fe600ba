// make_plan: validation, choice of back end, sequences, and the layout of saved branch results.
#include "dilated/plan.h"

#include <algorithm>
#include <cmath>

#include <fmt/format.h>

#include "src/backend_table.h"
#include "src/class_rows.h"
#include "src/geometry.h"
#include "src/sequences.h"

namespace dilated {
namespace {

bool some_head_runs_several_branches(const Problem& problem) {
  for (std::int64_t h = 0; h < problem.num_heads; ++h) {
    const auto runs = [h](const Branch& branch) {
      return branch.offsets[static_cast<std::size_t>(h)] >= 0;
    };
    if (std::count_if(problem.branches.begin(), problem.branches.end(), runs) > 1) {
      return true;
    }
  }
  return false;
}

}  // namespace

Plan make_plan(const Problem& problem, std::string_view backend) {
  validate(problem);
  Plan plan;
  plan.backend_ = &select_backend(problem, backend);
  plan.problem_ = problem;
  plan.scale_ = problem.scale.value_or(1.0 / std::sqrt(static_cast<double>(problem.head_dim)));
  plan.sequences_ = sequences_of(problem);
  const bool exact_lse = problem.merge == Merge::kLse && problem.lse_grad;
  plan.needs_branch_outputs_ = !exact_lse && some_head_runs_several_branches(problem);
  const bool packed = !problem.cu_seqlens.empty();
  const std::int64_t rows = problem.query_rows();
  const std::int64_t count = packed ? problem.num_sequences() : 1;
  const std::int64_t extra = problem.windows.empty() ? count + 1 : 3 * count;
  for (const Branch& branch : problem.branches) {
    std::int64_t row = plan.branch_rows_;
    for (const Sequence& sequence : plan.sequences_) {
      plan.branch_row_begin_.push_back(row);
      if (packed && sequence.length > 0) {
        row += BranchGeometry(sequence.length, branch.segment, branch.dilation)
                   .compact_rows(sequence.queries);
      }
    }
    plan.branch_rows_ += std::min(rows, rows / branch.dilation + rows / branch.segment + extra);
  }
  if (problem.key_layout == KeyLayout::kClassRows) {
    for (const Branch& branch : problem.branches) {
      plan.class_rows_.push_back(class_columns(problem, branch));
      // Batch elements that are not packed are alike.
      for (std::size_t s = 0; s < (packed ? plan.sequences_.size() : problem.batch > 0); ++s) {
        const Sequence& sequence = plan.sequences_[s];
        add_partial_segments(branch, problem.is_causal, sequence.length, sequence.keys, s,
                             plan.class_rows_.back(), plan.class_row_count_);
      }
    }
  }
  plan.decision_ = plan.backend_->decide(plan);
  return plan;
}

std::string_view Plan::backend_name() const { return backend_->name; }

std::int64_t Plan::branch_row_begin(std::size_t branch, std::size_t sequence) const {
  return branch_row_begin_[branch * sequences_.size() + sequence];
}

const PartialSegment* Plan::partial_segment(std::size_t branch, std::size_t sequence,
                                            std::int64_t segment) const {
  if (class_rows_.empty()) {
    return nullptr;
  }
  const std::size_t of = problem_.cu_seqlens.empty() ? 0 : sequence;
  const std::vector<PartialSegment>& parts = class_rows_[branch].segments;
  const auto found = std::find_if(parts.begin(), parts.end(), [&](const PartialSegment& part) {
    return part.sequence == of && part.segment == segment;
  });
  return found == parts.end() ? nullptr : &*found;
}

std::string Plan::to_string() const {
  return dilated::to_string(problem_) +
         fmt::format(
             "backend       {} ({})\nsequences     {}\nscale         {}\nbranch_rows   {}\n{}"
             "workspace     {} bytes forward, {} bytes backward\n",
             backend_->name, backend_->description(), sequences_.size(), scale_, branch_rows_,
             decision_->to_string(), workspace_bytes(Pass::kForward),
             workspace_bytes(Pass::kBackward));
}

}  // namespace dilated
