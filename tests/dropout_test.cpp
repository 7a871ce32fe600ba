// M16, R5: the dropout mask is read back through the operator and put into the
// definition; the mean over seeds is the result without dropout; p = 1 gives zeros; the log-sum-exp
// never moves.
#include "src/dropout.h"

#include <cmath>

#include <gtest/gtest.h>

#include "tests/support/materialised.h"

namespace dilated {
namespace {

using testing::Inputs;
using testing::make_inputs;
using testing::Results;

// Philox4x32-10 known answers (Random123 kat_vectors): key 0 counter 0, and all ones.
static_assert(dropout_draw(0, 0, 0) == 0x6627E8D5u);
static_assert(dropout_draw(~0ull, ~0ull, ~0ull) == 0x408F276Du);

TEST(Dropout, M16TheMaskReadBackIsTheOneOfTheDefinition) {
  // Equal scores and V = identity: out[p][j] = m_pj / (n (1 - p)).
  constexpr std::int64_t kLength = 130;
  constexpr double kP = 0.4;
  for (const char* backend : {"cpu", "reference"}) {
    Problem problem = testing::paper_problem(kLength, 2, kLength, {{kLength, 1}});
    problem.batch = 2;
    problem.dropout_p = kP;
    Inputs inputs = make_inputs(problem);
    inputs.query.fill(0.0);
    inputs.value.for_each(
        [&](auto i, auto j, auto h, auto c) { inputs.value.set(i, j, h, c, j == c ? 1.0 : 0.0); });
    inputs.dropout_state = {123456789012345, 77};
    const Results got = testing::run(problem, inputs, {.backend = backend});
    std::int64_t kept = 0;
    got.out.for_each([&](auto b, auto p, auto h, auto j) {
      const std::uint64_t stream = static_cast<std::uint64_t>(b * 2 + h);
      const bool keep =
          dropout_draw(dropout_key(123456789012345, 77, stream), static_cast<std::uint64_t>(p),
                       static_cast<std::uint64_t>(j)) < dropout_threshold(kP);
      kept += keep;
      ASSERT_NEAR(got.out.at(b, p, h, j), keep ? 1.0 / (kLength * (1.0 - kP)) : 0.0, 1e-8)
          << backend;
    });
    const double count = 4.0 * kLength * kLength;
    EXPECT_NEAR(static_cast<double>(kept) / count, 1.0 - kP,
                4.0 * std::sqrt(kP * (1.0 - kP) / count));
  }
}

TEST(Dropout,
     M16TheSameMaskActsForwardAndBackward) {  // P m/(1-p) in dV, m/(1-p) dP in dS, dropped O in D
  for (const Merge merge : {Merge::kLse, Merge::kSum, Merge::kMean}) {
    for (const bool lse_grad : {true, false}) {
      if (!lse_grad && merge != Merge::kLse) {
        continue;
      }
      Problem problem = testing::paper_problem(90, 2, 8, {{32, 1}, {90, 2}, {32, 1}});
      problem.merge = merge;
      problem.lse_grad = lse_grad;
      problem.dropout_p = 0.35;
      const Inputs inputs = make_inputs(problem, {.amplitude = 1.0, .with_dlse = true});
      const Results got = testing::run(problem, inputs, {.backend = "cpu"});
      EXPECT_EQ(difference(got, testing::materialised(problem, inputs, DType::kFloat64), 2e-5), "");
      Problem without = problem;
      without.dropout_p = 0.0;
      const Results plain = testing::run(without, inputs, {.backend = "cpu"});
      EXPECT_EQ(difference(got.lse, plain.lse, 1e-6), "");
      EXPECT_GT(max_error(got.out, plain.out), 0.01);
    }
  }
}

TEST(Dropout, TheMeanOverSeedsIsTheResultWithoutDropout) {
  constexpr int kSeeds = 4096;
  Problem problem = testing::paper_problem(10, 2, 3, {{10, 1}, {10, 2}});
  Inputs inputs = make_inputs(problem);
  const Results expected = testing::run(problem, inputs, {.backend = "cpu"});
  problem.dropout_p = 0.3;
  const Plan plan = make_plan(problem, "cpu");
  testing::Tensor sum(DType::kFloat64, expected.out.shape());
  testing::Tensor squares = sum;
  sum.fill(0.0);
  squares.fill(0.0);
  for (int seed = 0; seed < kSeeds; ++seed) {
    inputs.dropout_state[0] = seed;
    const Results got = testing::run(plan, inputs, {.backend = "cpu"});
    sum.for_each([&](auto i, auto p, auto h, auto c) {
      const double x = got.out.at(i, p, h, c);
      sum.set(i, p, h, c, sum.at(i, p, h, c) + x);
      squares.set(i, p, h, c, squares.at(i, p, h, c) + x * x);
    });
  }
  sum.for_each([&](auto i, auto p, auto h, auto c) {
    const double mean = sum.at(i, p, h, c) / kSeeds;
    const double variance = squares.at(i, p, h, c) / kSeeds - mean * mean;
    // 60 means at once: 4 sigma each, and the seeds are fixed.
    EXPECT_NEAR(mean, expected.out.at(i, p, h, c), 4.0 * std::sqrt(variance / kSeeds) + 1e-6);
  });
}

TEST(Dropout, EverythingDroppedGivesZeros) {
  for (const char* backend : {"cpu", "reference"}) {
    Problem problem = testing::paper_problem(40, 2, 8, {{16, 1}, {40, 2}});
    const Inputs inputs = make_inputs(problem);
    const Results plain = testing::run(problem, inputs, {.backend = backend});
    problem.dropout_p = 1.0;
    const Results got = testing::run(problem, inputs, {.backend = backend});
    for (const testing::Tensor* tensor : {&got.out, &got.dquery, &got.dkey, &got.dvalue}) {
      tensor->for_each(
          [&](auto i, auto p, auto h, auto c) { ASSERT_EQ(tensor->at(i, p, h, c), 0.0); });
    }
    EXPECT_EQ(bit_difference(got.lse, plain.lse), "");
  }
}

TEST(Dropout,
     HalfOfManyKeysNeverDropsAWholeRow) {  // R5: V = 1, p = 0.5, at least 64 keys
  Problem problem = testing::paper_problem(256, 2, 4, {{64, 1}});
  problem.dropout_p = 0.5;
  Inputs inputs = make_inputs(problem, {.amplitude = 0.5});
  inputs.value.fill(1.0);
  const Results got = testing::run(problem, inputs, {.backend = "cpu"});
  got.out.for_each([&](auto i, auto p, auto h, auto c) { ASSERT_GT(got.out.at(i, p, h, c), 0.1); });
}

TEST(Dropout, SeedAndOffsetChooseTheMask) {  // X3
  Problem problem = testing::paper_problem(50, 2, 4, {{50, 1}});
  problem.dropout_p = 0.5;
  Inputs inputs = make_inputs(problem);
  const Results first = testing::run(problem, inputs, {.backend = "cpu"});
  EXPECT_EQ(bit_difference(testing::run(problem, inputs, {.backend = "cpu"}), first), "");
  Inputs other = inputs;
  other.dropout_state[0] += 1;
  EXPECT_NE(bit_difference(testing::run(problem, other, {.backend = "cpu"}), first), "");
  other = inputs;
  other.dropout_state[1] += 1;
  EXPECT_NE(bit_difference(testing::run(problem, other, {.backend = "cpu"}), first), "");
}

}  // namespace
}  // namespace dilated
