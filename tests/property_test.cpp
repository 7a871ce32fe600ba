// Random problems with all options together (RapidCheck): the reference against the restated
// oracle, the CPU back end against the reference. On failure RapidCheck prints the shrunk problem
// and the seed; RC_PARAMS=seed=N repeats.
#include <gtest/gtest.h>

#include "tests/support/materialised.h"
#include "tests/support/random_problem.h"

namespace dilated::testing {
namespace {

constexpr int kDraws = 32;  // of the yardstick, see rule_violation

TEST(RandomProblems, ReferenceInDoubleEqualsTheOracle) {
  check_property(
      "reference, float64", 250, {.dtype = DType::kFloat64, .max_seqlen = 40},
      [](const RandomCase& drawn) {
        return difference(
            run(drawn.problem, drawn.inputs, {.backend = "reference", .layout = Layout::kGaps}),
            materialised(drawn.problem, drawn.inputs, DType::kFloat64), 1e-11);
      });
}

TEST(RandomProblems, ReferenceInFloatKeepsTheRule) {
  check_property("reference, float32", 100, {.dtype = DType::kFloat32, .max_seqlen = 40},
                 [](const RandomCase& drawn) {
                   return rule_violation(drawn.problem, drawn.inputs,
                                         run(drawn.problem, drawn.inputs, {.backend = "reference"}),
                                         kDraws);
                 });
}

TEST(RandomProblems, CpuInFloatKeepsTheRule) {
  check_property("cpu, float32", 500, {.dtype = DType::kFloat32}, [](const RandomCase& drawn) {
    return rule_violation(
        drawn.problem, drawn.inputs,
        run(drawn.problem, drawn.inputs, {.backend = "cpu", .layout = Layout::kGaps}), kDraws);
  });
}

TEST(RandomProblems, CpuInFloatKeepsTheRuleOnLongerSequences) {
  check_property("cpu, float32, longer", 60,
                 {.dtype = DType::kFloat32, .max_seqlen = 400, .max_head_dim = 140},
                 [](const RandomCase& drawn) {
                   return rule_violation(drawn.problem, drawn.inputs,
                                         run(drawn.problem, drawn.inputs, {.backend = "cpu"}),
                                         kDraws);
                 });
}

TEST(RandomProblems, CpuInBFloat16KeepsTheRule) {
  check_property("cpu, bfloat16", 250, {.dtype = DType::kBFloat16}, [](const RandomCase& drawn) {
    return rule_violation(drawn.problem, drawn.inputs,
                          run(drawn.problem, drawn.inputs, {.backend = "cpu"}), kDraws);
  });
}

TEST(RandomProblems, CpuInFloat16KeepsTheRule) {
  check_property("cpu, float16", 250, {.dtype = DType::kFloat16}, [](const RandomCase& drawn) {
    return rule_violation(drawn.problem, drawn.inputs,
                          run(drawn.problem, drawn.inputs, {.backend = "cpu"}), kDraws);
  });
}

TEST(RandomProblems, StridedEqualsContiguousToTheBit) {  // R17
  check_property("strided", 100, {.dtype = DType::kFloat32}, [](const RandomCase& drawn) {
    Inputs contiguous = drawn.inputs;
    for (Tensor* tensor :
         {&contiguous.query, &contiguous.key, &contiguous.value, &contiguous.dout}) {
      *tensor = tensor->converted(drawn.problem.dtype);
    }
    const Results expected = run(drawn.problem, contiguous, {.backend = "cpu"});
    for (const Layout layout : {Layout::kBshd, Layout::kBhsd, Layout::kGaps}) {
      const std::string text = bit_difference(
          run(drawn.problem, drawn.inputs, {.backend = "cpu", .layout = layout}), expected);
      if (!text.empty()) {
        return text;
      }
    }
    return std::string();
  });
}

TEST(RandomProblems, PlanIsAFunctionOfTheProblem) {
  check_property("plan", 100, {.dtype = DType::kFloat32}, [](const RandomCase& drawn) {
    const Plan first = make_plan(drawn.problem);
    const Plan second = make_plan(first.problem());
    const bool equal = first.problem() == second.problem() &&
                       first.to_string() == second.to_string() &&
                       first.branch_rows() == second.branch_rows();
    return std::string(equal ? "" : "two plans of one problem differ");
  });
}

}  // namespace
}  // namespace dilated::testing
