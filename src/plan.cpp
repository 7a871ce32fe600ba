// make_plan: validation, choice of back end, sequences, and the layout of saved branch results.
#include "dilated/plan.h"

#include <algorithm>
#include <cmath>

#include <fmt/format.h>

#include "src/backend_table.h"
#include "src/geometry.h"

namespace dilated {
namespace {

std::vector<Sequence> sequences_of(const Problem& problem) {
  std::vector<Sequence> sequences;
  if (problem.cu_seqlens.empty()) {
    for (std::int64_t b = 0; b < problem.batch; ++b) {
      sequences.push_back({b, 0, problem.seqlen});
    }
  }
  for (std::size_t s = 1; s < problem.cu_seqlens.size(); ++s) {
    const std::int64_t start = problem.cu_seqlens[s - 1];
    sequences.push_back({0, start, problem.cu_seqlens[s] - start});
  }
  return sequences;
}

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
  if (plan.needs_branch_outputs_) {
    const bool packed = !problem.cu_seqlens.empty();
    const std::int64_t n = problem.seqlen;
    const std::int64_t count =
        packed ? static_cast<std::int64_t>(problem.cu_seqlens.size()) - 1 : 1;
    for (const Branch& branch : problem.branches) {
      std::int64_t row = plan.branch_rows_;
      for (const Sequence& sequence : plan.sequences_) {
        plan.branch_row_begin_.push_back(row);
        if (packed && sequence.length > 0) {
          row += BranchGeometry(sequence.length, branch.segment, branch.dilation).compact_rows();
        }
      }
      plan.branch_rows_ += std::min(n, n / branch.dilation + n / branch.segment + count + 1);
    }
  }
  return plan;
}

std::string_view Plan::backend_name() const { return backend_->name; }

std::int64_t Plan::branch_row_begin(std::size_t branch, std::size_t sequence) const {
  return branch_row_begin_[branch * sequences_.size() + sequence];
}

std::int64_t Plan::workspace_bytes(Pass pass, int threads) const {
  return backend_->workspace_bytes(*this, pass, threads);
}

std::string Plan::to_string() const {
  return dilated::to_string(problem_) +
         fmt::format(
             "backend       {} ({})\nsequences     {}\nscale         {}\nbranch_rows   {}\n"
             "workspace     {} bytes forward, {} bytes backward on one thread\n",
             backend_->name, backend_->description(), sequences_.size(), scale_, branch_rows_,
             workspace_bytes(Pass::kForward, 1), workspace_bytes(Pass::kBackward, 1));
}

}  // namespace dilated
