// Every back end x dtype x head_dim under the tolerance rule (semantics §11), and every SIMD target
// of this machine. Prints what ran; DILATED_REQUIRE=cpu or cpu/AVX2 fails where that did not run.
#include <algorithm>
#include <bit>
#include <cstdlib>
#include <iostream>
#include <set>

#include "hwy/targets.h"
#include <gtest/gtest.h>

#include "dilated/backend.h"

#include "tests/support/materialised.h"

namespace dilated {
namespace {

using testing::Inputs;
using testing::make_inputs;
using testing::Results;

std::string description_of(std::string_view name) {
  for (const BackendInfo& info : backends()) {
    if (info.name == name) {
      return info.description;
    }
  }
  return "not in the table";
}

TEST(Parity, TheRequiredBackendRuns) {  // R7, X2
  const Plan plan = make_plan(testing::paper_problem(8, 2, 8, {{4, 1}}));
  const std::string name(plan.backend_name());
  std::cout << "back end " << name << ", " << description_of(name) << "\n";
  const char* variable = std::getenv("DILATED_REQUIRE");
  const std::string required = variable == nullptr ? "" : variable;
  const std::size_t slash = required.find('/');
  if (!required.empty()) {
    EXPECT_EQ(name, required.substr(0, slash));
  }
  if (slash != std::string::npos) {
    EXPECT_NE(description_of(name).find(required.substr(slash + 1)), std::string::npos)
        << description_of(name);
  }
}

constexpr std::int64_t kHeadDims[] = {1, 3, 16, 24, 32, 48, 64, 96, 120, 128, 256};  // T16

struct KernelCase {
  const char* backend;
  DType dtype;
};

class Kernels : public ::testing::TestWithParam<std::tuple<KernelCase, std::int64_t>> {
 protected:
  void expect_rule(Problem problem,
                   const testing::InputOptions& options = {.amplitude = 1.0}) const {
    const auto& [kernel, head_dim] = GetParam();
    problem.dtype = kernel.dtype;
    problem.head_dim = head_dim;
    const Inputs inputs = make_inputs(problem, options);
    const Results got = testing::run(problem, inputs, {.backend = kernel.backend});
    EXPECT_EQ(testing::rule_violation(problem, inputs, got), "") << to_string(problem);
  }
};

TEST_P(Kernels, DenseAndDilatedFull) {  // ragged n, several tiles and blocks
  expect_rule(testing::paper_problem(331, 2, 0, {{150, 1}, {331, 2}}));
}

TEST_P(Kernels, DenseAndDilatedCausal) {
  Problem problem = testing::paper_problem(331, 2, 0, {{331, 1}, {200, 3}});
  problem.is_causal = true;
  expect_rule(problem, {.amplitude = 1.0, .with_dlse = true});
}

TEST_P(Kernels, PhantomDetached) {  // preset torchscale on a ragged length: T1
  Problem problem = testing::paper_problem(205, 2, 0, {{64, 1}, {128, 2}, {512, 4}});
  problem.tail = Tail::kPhantom;
  problem.lse_grad = false;
  expect_rule(problem, {.amplitude = 1.0, .with_dlse = true, .layout = testing::Layout::kBhsd});
}

TEST_P(Kernels, GroupedQueriesPackedMaskedMean) {
  Problem problem = testing::paper_problem(170, 4, 0, {{40, 1}, {100, 3}});
  problem.num_kv_heads = 2;
  problem.merge = Merge::kMean;
  problem.out_scale = 0.5;
  problem.has_key_mask = true;
  problem.cu_seqlens = {0, 70, 70, 71, 170};
  expect_rule(problem, {.amplitude = 1.0, .with_dlse = true, .layout = testing::Layout::kGaps});
}

TEST_P(Kernels, DropoutSumCausal) {
  Problem problem = testing::paper_problem(150, 2, 0, {{64, 1}, {150, 2}});
  problem.merge = Merge::kSum;
  problem.is_causal = true;
  problem.dropout_p = 0.3;
  problem.has_seqused = true;
  expect_rule(problem);
}

std::string name_of_case(const ::testing::TestParamInfo<Kernels::ParamType>& info) {
  const auto& [kernel, head_dim] = info.param;
  return std::string(kernel.backend) + "_" + std::string(name_of(kernel.dtype)) + "_d" +
         std::to_string(head_dim);
}

INSTANTIATE_TEST_SUITE_P(Cpu, Kernels,
                         ::testing::Combine(::testing::Values(KernelCase{"cpu", DType::kFloat32},
                                                              KernelCase{"cpu", DType::kBFloat16},
                                                              KernelCase{"cpu", DType::kFloat16}),
                                            ::testing::ValuesIn(kHeadDims)),
                         name_of_case);
INSTANTIATE_TEST_SUITE_P(Reference, Kernels,
                         ::testing::Combine(::testing::Values(KernelCase{"reference",
                                                                         DType::kFloat32}),
                                            ::testing::Values<std::int64_t>(1, 24, 64)),
                         name_of_case);

TEST(CpuKernels, MoreRowsThanOneBlock) {
  for (const bool is_causal : {false, true}) {
    Problem problem = testing::paper_problem(1100, 2, 64, {{1100, 1}, {1100, 2}});
    problem.is_causal = is_causal;
    const Inputs inputs = make_inputs(problem, {.amplitude = 1.0});
    EXPECT_EQ(
        testing::rule_violation(problem, inputs, testing::run(problem, inputs, {.backend = "cpu"})),
        "");
  }
}

TEST(CpuKernels, EverySupportedHeadDimension) {  // T16: no dimension is special
  for (std::int64_t head_dim = 1; head_dim <= 256; ++head_dim) {
    SCOPED_TRACE(head_dim);
    Problem problem = testing::paper_problem(21, 2, head_dim, {{8, 1}, {21, 2}});
    problem.is_causal = head_dim % 2 == 0;
    const Inputs inputs = make_inputs(problem, {.amplitude = 1.0});
    ASSERT_EQ(
        testing::rule_violation(problem, inputs, testing::run(problem, inputs, {.backend = "cpu"})),
        "");
  }
}

TEST(CpuKernels, EveryLengthUpToThreeSegments) {  // X14, X1: batch, n, H, d pairwise different
  for (std::int64_t n = 0; n <= 27; ++n) {
    for (const bool is_causal : {false, true}) {
      SCOPED_TRACE(n);
      Problem problem = testing::paper_problem(n, 3, 5, {{4, 1}, {6, 2}, {9, 4}});
      problem.batch = 2;
      problem.is_causal = is_causal;
      problem.tail = Tail::kPhantom;
      const Inputs inputs = make_inputs(problem, {.amplitude = 1.0});
      ASSERT_EQ(testing::rule_violation(problem, inputs,
                                        testing::run(problem, inputs, {.backend = "cpu"})),
                "");
    }
  }
}

/// Restricts Highway to one target at a time and gives back the choice at the end.
class SimdTargets : public ::testing::Test {
 protected:
  void TearDown() override { hwy::SetSupportedTargetsForTest(0); }
};

TEST_F(SimdTargets, EachOneKeepsTheToleranceRule) {
  const auto supported = static_cast<std::uint64_t>(hwy::SupportedTargets());
  std::set<std::string> seen;
  for (int bit = 0; bit < 63; ++bit) {
    const std::uint64_t target = std::uint64_t{1} << bit;
    if ((supported & target) == 0) {
      continue;
    }
    hwy::SetSupportedTargetsForTest(static_cast<std::int64_t>(target));
    const std::string description = description_of("cpu");
    if (!seen.insert(description).second) {
      continue;  // a target that was not compiled: its next best has been tested already
    }
    std::cout << "SIMD target " << description << "\n";
    for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
      for (const std::int64_t head_dim : {1, 24, 48, 64, 120}) {
        SCOPED_TRACE(description + " " + std::string(name_of(dtype)) + " head_dim " +
                     std::to_string(head_dim));
        Problem problem = testing::paper_problem(190, 2, head_dim, {{190, 1}, {100, 2}});
        problem.dtype = dtype;
        problem.is_causal = head_dim % 16 == 0;
        problem.dropout_p = head_dim == 24 ? 0.2 : 0.0;
        const Inputs inputs = make_inputs(problem, {.amplitude = 1.0});
        EXPECT_EQ(testing::rule_violation(problem, inputs,
                                          testing::run(problem, inputs, {.backend = "cpu"})),
                  "");
      }
    }
  }
  // Only on x86 is more than one target compiled.
  EXPECT_GE(seen.size(), HWY_ARCH_X86 && std::popcount(supported) > 1 ? 2u : 1u);
}

}  // namespace
}  // namespace dilated
