// M15 (per-branch flash backward fed with global statistics) and M17 (finite differences, float64,
// for dO and dL).
#include <cmath>

#include <gtest/gtest.h>

#include "tests/support/materialised.h"

namespace dilated {
namespace {

using testing::Inputs;
using testing::make_inputs;
using testing::Results;
using testing::Tensor;

/// <out, dout> + <lse, dlse>.
double objective(const Problem& problem, const Inputs& inputs) {
  const Results got = testing::run(problem, inputs, {.backend = "reference"});
  double sum = 0.0;
  got.out.for_each([&](auto i, auto p, auto h, auto c) {
    sum += got.out.at(i, p, h, c) * inputs.dout.at(i, p, h, c);
  });
  got.lse.for_each([&](auto i, auto h, auto p, auto c) {
    const double lse = got.lse.at(i, h, p, c);
    sum += std::isinf(lse) || !inputs.dlse ? 0.0 : lse * inputs.dlse->at(i, h, p, c);
  });
  return sum;
}

void expect_finite_differences_agree(const Problem& problem, const Inputs& inputs) {
  const Results got = testing::run(problem, inputs, {.backend = "reference"});
  struct Pair {
    Tensor Inputs::* input;
    Tensor Results::* gradient;
  };
  const Pair pairs[] = {{&Inputs::query, &Results::dquery},
                        {&Inputs::key, &Results::dkey},
                        {&Inputs::value, &Results::dvalue}};
  for (const Pair& pair : pairs) {
    const auto shifted = [&](double step) {
      Inputs moved = inputs;
      std::uint64_t index = 0;
      (moved.*pair.input).for_each([&](auto i, auto p, auto h, auto c) {
        (moved.*pair.input)
            .set(i, p, h, c, (moved.*pair.input).at(i, p, h, c) + step * testing::val(50, index++));
      });
      return objective(problem, moved);
    };
    double analytic = 0.0;
    std::uint64_t index = 0;
    (got.*pair.gradient).for_each([&](auto i, auto p, auto h, auto c) {
      analytic += (got.*pair.gradient).at(i, p, h, c) * testing::val(50, index++);
    });
    constexpr double kStep = 1e-4;
    const double numeric =
        (8.0 * (shifted(kStep) - shifted(-kStep)) - (shifted(2 * kStep) - shifted(-2 * kStep))) /
        (12.0 * kStep);
    EXPECT_NEAR(analytic, numeric, 1e-7 * std::max(1.0, std::abs(analytic)));
  }
}

TEST(Gradients, M17FiniteDifferences) {
  for (const Merge merge : {Merge::kLse, Merge::kSum, Merge::kMean}) {
    for (const Tail tail : {Tail::kMask, Tail::kPhantom}) {
      for (const bool is_causal : {false, true}) {
        for (const bool with_dlse : {false, true}) {
          for (const double dropout_p : {0.0, 0.3}) {
            Problem problem = testing::paper_problem(15, 4, 3, {{4, 1}, {8, 3}, {20, 4}});
            problem.dtype = DType::kFloat64;
            problem.num_kv_heads = 2;
            problem.merge = merge;
            problem.tail = tail;
            problem.is_causal = is_causal;
            problem.dropout_p = dropout_p;
            problem.out_scale = 0.5;
            problem.has_key_mask = true;
            expect_finite_differences_agree(
                problem, make_inputs(problem, {.amplitude = 1.0, .with_dlse = with_dlse}));
          }
        }
      }
    }
  }
}

/// One branch alone on the CPU back end.
struct BranchRun {
  Problem problem;
  Results forward;
};

BranchRun run_branch(const Problem& problem, std::size_t b, const Inputs& inputs) {
  BranchRun result{problem, {}};
  result.problem.branches = {problem.branches[b]};
  result.problem.out_scale = 1.0;
  result.problem.lse_grad = true;
  result.forward = testing::run(result.problem, inputs, {.backend = "cpu"});
  return result;
}

/// Flash backward of one branch with `out` and `lse` given, added to `sums`.
void add_backward(const Problem& problem, const Inputs& inputs, const Tensor& out,
                  const Tensor& lse, const Tensor& dout, Results& sums) {
  const Plan plan = make_plan(problem, "cpu");
  Results got{{},
              {},
              Tensor(problem.dtype, inputs.query.shape()),
              Tensor(problem.dtype, inputs.key.shape()),
              Tensor(problem.dtype, inputs.value.shape())};
  BackwardTensors tensors;
  tensors.dout = dout.view();
  tensors.query = inputs.query.view();
  tensors.key = inputs.key.view();
  tensors.value = inputs.value.view();
  tensors.out = out.view();
  tensors.lse = lse.rows();
  tensors.dquery = got.dquery.view();
  tensors.dkey = got.dkey.view();
  tensors.dvalue = got.dvalue.view();
  backward(plan, tensors);
  for (Tensor Results::* member : {&Results::dquery, &Results::dkey, &Results::dvalue}) {
    (sums.*member).for_each([&](auto i, auto p, auto h, auto c) {
      (sums.*member).set(i, p, h, c, (sums.*member).at(i, p, h, c) + (got.*member).at(i, p, h, c));
    });
  }
}

TEST(Gradients, M15EqualPerBranchFlashBackward) {
  for (const bool lse_grad : {true, false}) {
    Problem problem = testing::paper_problem(80, 4, 16, {{16, 1}, {32, 2}, {80, 4}});
    problem.out_scale = 0.5;
    problem.lse_grad = lse_grad;
    const Inputs inputs = make_inputs(problem, {.amplitude = 1.0});
    const Results whole = testing::run(problem, inputs, {.backend = "cpu"});
    Results sums = whole;
    for (Tensor* tensor : {&sums.dquery, &sums.dkey, &sums.dvalue}) {
      tensor->fill(0.0);
    }
    for (std::size_t b = 0; b < problem.branches.size(); ++b) {
      const BranchRun branch = run_branch(problem, b, inputs);
      Tensor upstream = inputs.dout;  // g, times w_b when detached
      Tensor merged = whole.out;      // O / out_scale
      upstream.for_each([&](auto i, auto p, auto h, auto c) {
        const double weight =
            lse_grad ? 1.0 : std::exp(branch.forward.lse.at(i, h, p) - whole.lse.at(i, h, p));
        upstream.set(i, p, h, c, 0.5 * weight * inputs.dout.at(i, p, h, c));
        merged.set(i, p, h, c, whole.out.at(i, p, h, c) / 0.5);
      });
      if (lse_grad) {
        add_backward(branch.problem, inputs, merged, whole.lse, upstream, sums);
      } else {
        add_backward(branch.problem, inputs, branch.forward.out, branch.forward.lse, upstream,
                     sums);
      }
    }
    EXPECT_EQ(difference(sums, whole, 1e-5), "") << lse_grad;
  }
}

}  // namespace
}  // namespace dilated
