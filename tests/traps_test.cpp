// Traps that need inputs of their own: T3, T8, T12, and the hostile values of
// R22.
#include <cmath>
#include <limits>

#include <gtest/gtest.h>

#include "tests/support/materialised.h"

namespace dilated {
namespace {

using testing::Inputs;
using testing::make_inputs;
using testing::Results;

constexpr double kInfinity = std::numeric_limits<double>::infinity();

/// Every score is exactly -3e8, where float32 has steps of 32: probabilities within a branch stay
/// exact.
Inputs with_huge_negative_scores(Problem& problem) {
  problem.scale = 1.0;
  Inputs inputs = make_inputs(problem);
  inputs.query.fill(-3e4);
  inputs.key.fill(1e4);
  return inputs;
}

TEST(Traps, T3AllScoresOfARowAtMinusThreeHundredMillion) {
  for (const char* backend : {"cpu", "reference"}) {
    Problem problem = testing::paper_problem(24, 2, 1, {{24, 2}});
    const Inputs inputs = with_huge_negative_scores(problem);
    const Results got = testing::run(problem, inputs, {.backend = backend});
    const Results expected = testing::reference(problem, inputs);
    EXPECT_EQ(difference(got.out, expected.out, 1e-6), "")
        << backend;  // the mean of twelve values, not 0
    EXPECT_EQ(difference(got.lse, expected.lse, 1e-6), "") << backend;
    EXPECT_EQ(got.lse.at(0, 0, 1), -kInfinity);  // really absent
    EXPECT_NEAR(got.lse.at(0, 0, 2), -3e8, 64.0);
  }
}

TEST(Traps, T3SeveralBranchesAtMinusThreeHundredMillion) {
  for (const char* backend : {"cpu", "reference"}) {
    for (const Merge merge : {Merge::kLse, Merge::kSum, Merge::kMean}) {
      Problem problem = testing::paper_problem(24, 1, 1, {{8, 1}, {24, 2}});
      problem.merge = merge;
      Inputs inputs = with_huge_negative_scores(problem);
      inputs.value.fill(1.0);
      const Results got = testing::run(problem, inputs, {.backend = backend});
      for (std::int64_t p = 0; p < 24;
           ++p) {  // V = 1: no branch is lost, whatever its weight rounds to
        EXPECT_NEAR(got.out.at(0, p, 0, 0), merge == Merge::kSum && p % 2 == 0 ? 2.0 : 1.0, 1e-6)
            << backend << p;
        EXPECT_NEAR(got.lse.at(0, 0, p), -3e8, 64.0);
        EXPECT_TRUE(std::isfinite(got.dquery.at(0, p, 0, 0)) &&
                    std::isfinite(got.dkey.at(0, p, 0, 0)));
        EXPECT_TRUE(std::isfinite(got.dvalue.at(0, p, 0, 0)));
      }
    }
  }
}

TEST(Traps, T3PhantomKeysWinAgainstHugeNegativeScores) {
  Problem problem = testing::paper_problem(9, 1, 1, {{8, 1}});
  problem.tail = Tail::kPhantom;
  const Inputs inputs = with_huge_negative_scores(problem);
  for (const char* backend : {"cpu", "reference"}) {
    const Results got = testing::run(problem, inputs, {.backend = backend});
    EXPECT_EQ(got.out.at(0, 8, 0, 0), 0.0);  // its segment holds 7 phantom keys with score 0
    EXPECT_NEAR(got.lse.at(0, 0, 8), std::log(7.0), 1e-6);
    EXPECT_EQ(got.dvalue.at(0, 8, 0, 0), 0.0);
    EXPECT_EQ(difference(got.out, testing::reference(problem, inputs).out, 1e-6), "");
  }
}

TEST(Traps, T8UncoveredRowsAreWritten) {  // outputs start as NaN
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    Problem problem = testing::paper_problem(300, 2, 24, {{60, 3}, {150, 4}});
    problem.dtype = dtype;
    const Inputs inputs = make_inputs(problem);
    const Results got =
        testing::run(problem, inputs, {.backend = "cpu", .layout = testing::Layout::kGaps});
    std::int64_t uncovered = 0;
    for (std::int64_t h = 0; h < 2; ++h) {
      const std::vector<std::int32_t> pattern = attention_pattern(problem, h);
      for (std::int64_t p = 0; p < 300; ++p) {
        const bool is_covered = pattern[static_cast<std::size_t>(p * 300 + p)] > 0;
        uncovered += !is_covered;
        ASSERT_EQ(got.lse.at(0, h, p) == -kInfinity, !is_covered);
        for (std::int64_t c = 0; c < 24; ++c) {
          ASSERT_TRUE(is_covered ||
                      (got.out.at(0, p, h, c) == 0.0 && got.dquery.at(0, p, h, c) == 0.0));
          ASSERT_FALSE(std::isnan(got.out.at(0, p, h, c)) || std::isnan(got.dkey.at(0, p, h, c)));
        }
      }
    }
    EXPECT_GT(uncovered, 200);
  }
}

TEST(Traps, T12MergeWeightsAreNotRoundedToTheInputDtype) {
  // Two branches with equal keys: w_b = 1/2 + a little. Rounding once at the end costs half an ulp
  // of O.
  Problem problem = testing::paper_problem(128, 2, 32, {{128, 1}, {64, 1}, {32, 2}});
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {
    problem.dtype = dtype;
    const Inputs inputs = make_inputs(problem, {.amplitude = 1.0});
    const Results got = testing::run(problem, inputs, {.backend = "cpu"});
    const Results exact = testing::reference(problem, inputs);
    double largest = 0.0;
    exact.out.for_each([&](auto i, auto p, auto h, auto c) {
      largest = std::max(largest, std::abs(exact.out.at(i, p, h, c)));
    });
    const double unit = dtype == DType::kBFloat16 ? 0x1p-8 : 0x1p-11;
    EXPECT_LE(max_error(got.out, exact.out), 1.5 * unit * largest);
  }
}

TEST(Traps, NonFiniteValuesStayInRowsThatAttendToThem) {  // R22
  for (const double poison : {std::numeric_limits<double>::quiet_NaN(), kInfinity}) {
    for (const char* backend : {"cpu", "reference"}) {
      Problem problem = testing::paper_problem(100, 2, 8, {{25, 1}, {100, 2}});
      Inputs inputs = make_inputs(problem, {.amplitude = 1.0});
      inputs.value.set(0, 30, 0, 3, poison);
      const Results got = testing::run(problem, inputs, {.backend = backend});
      const std::vector<std::int32_t> pattern = attention_pattern(problem, 0);
      got.out.for_each([&](auto i, auto p, auto h, auto c) {
        const bool attends =
            h == 0 && c == 3 && pattern[static_cast<std::size_t>(p * 100 + 30)] > 0;
        ASSERT_EQ(std::isfinite(got.out.at(i, p, h, c)), !attends)
            << backend << " " << p << " " << h << " " << c;
      });
    }
  }
}

TEST(Traps, TheMaximumMovesFromTileToTile) {  // X7: older sums are rescaled in every tile of keys
  for (const bool is_causal : {false, true}) {
    Problem problem = testing::paper_problem(1000, 2, 16, {{1000, 1}, {600, 2}});
    problem.is_causal = is_causal;
    problem.scale = 1.0;
    Inputs inputs = make_inputs(problem, {.amplitude = 0.5});
    inputs.query.for_each([&](auto b, auto p, auto h, auto c) {
      if (c == 0) {
        inputs.query.set(b, p, h, c, h == 0 ? 1.0 : -1.0);
        inputs.key.set(b, p, h, c, static_cast<double>(p) / 100.0);  // rises or falls by head
      }
    });
    EXPECT_EQ(testing::rule_violation(problem, inputs,
                                      testing::run(problem, inputs, {.backend = "cpu"}), 32),
              "");
  }
}

TEST(Traps, ZerosAndDenormals) {  // R22
  for (const double amplitude : {0.0, 1e-40}) {
    Problem problem = testing::paper_problem(50, 2, 8, {{16, 1}, {50, 2}});
    Inputs inputs = make_inputs(problem, {.amplitude = amplitude});
    const Results got = testing::run(problem, inputs, {.backend = "cpu"});
    EXPECT_EQ(difference(got, testing::reference(problem, inputs), 1e-6), "");
    EXPECT_NEAR(got.lse.at(0, 1, 1), std::log(16.0 + 25.0), 1e-5);
  }
}

}  // namespace
}  // namespace dilated
