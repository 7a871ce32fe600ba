// M12: partial results merged by merge.h equal one pass, in any grouping; the merge is associative,
// commutative and has an identity.
#include "src/merge.h"

#include <cmath>

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include "tests/support/materialised.h"

namespace dilated {
namespace {

using testing::make_inputs;
using testing::Results;

constexpr double kAbsent = kAbsentLse<double>;

struct Partial {
  double lse;
  double out;
};

Partial merged(const Partial& a, const Partial& b) {
  const MergeWeights<double> weights = merge_weights(a.lse, b.lse);
  return {weights.lse, weights.first * a.out + weights.second * b.out};
}

void expect_equal(const Partial& a, const Partial& b) {
  if (a.lse == kAbsent || b.lse == kAbsent) {
    EXPECT_EQ(a.lse, b.lse);
  } else {
    EXPECT_NEAR(a.lse, b.lse, 1e-12 * std::max(1.0, std::abs(b.lse)));
  }
  EXPECT_NEAR(a.out, b.out, 1e-12 * std::max(1.0, std::abs(b.out)));
}

Partial draw_partial() {
  const int tenths = *rc::gen::inRange(-5000, 5000);
  const bool is_absent = *rc::gen::inRange(0, 5) == 0;
  return is_absent ? Partial{kAbsent, 0.0}
                   : Partial{tenths / 10.0, *rc::gen::inRange(-100, 100) / 10.0};
}

RC_GTEST_PROP(Merge, IsAssociativeAndCommutativeWithAnIdentity, ()) {
  const Partial a = draw_partial();
  const Partial b = draw_partial();
  const Partial c = draw_partial();
  expect_equal(merged(a, b), merged(b, a));
  expect_equal(merged(merged(a, b), c), merged(a, merged(b, c)));
  expect_equal(merged(a, {kAbsent, 0.0}), a);
  expect_equal(merged({kAbsent, 0.0}, a), a);
  RC_ASSERT(!::testing::Test::HasFailure());
}

TEST(Merge, ZeroAndHugeValuesAreValues) {  // T3, T4
  expect_equal(merged({0.0, 2.0}, {0.0, 4.0}), {std::log(2.0), 3.0});
  expect_equal(merged({-3e8, 2.0}, {-3e8, 4.0}), {-3e8 + std::log(2.0), 3.0});
  expect_equal(merged({-3e8, 2.0}, {kAbsent, 0.0}), {-3e8, 2.0});
  expect_equal(merged({1e4, 2.0}, {-1e4, 4.0}), {1e4, 2.0});
  expect_equal(merged({kAbsent, 0.0}, {kAbsent, 0.0}), {kAbsent, 0.0});
  const MergeWeights<float> weights = merge_weights(1.0f, 0.0f);
  EXPECT_NEAR(weights.first / weights.second, std::exp(1.0f), 1e-6);
  EXPECT_NEAR(weights.lse, std::log(std::exp(1.0) + 1.0), 1e-6);
}

Partial partial_at(const Results& results, std::int64_t p, std::int64_t h, std::int64_t c) {
  return {results.lse.at(0, h, p), results.out.at(0, p, h, c)};
}

TEST(Merge, M12PartialResultsInAnyGroupingEqualOnePass) {
  for (const char* backend : {"reference", "cpu"}) {
    const double tolerance = std::string_view(backend) == "cpu" ? 1e-5 : 1e-12;
    Problem whole = testing::paper_problem(60, 4, 8, {{6, 2}, {20, 1}, {60, 4}, {33, 3}});
    whole.branches[1].offsets[2] = -1;  // some rows of head 2 lack that branch
    whole.dtype = std::string_view(backend) == "cpu" ? DType::kFloat32 : DType::kFloat64;
    const testing::Inputs inputs = make_inputs(whole, {.amplitude = 1.0});
    const Results expected = testing::run(whole, inputs, {.backend = backend});
    const auto of_branches = [&](std::initializer_list<std::size_t> numbers) {
      Problem part = whole;
      part.branches.clear();
      for (const std::size_t b : numbers) {
        part.branches.push_back(whole.branches[b]);
      }
      return testing::run(part, inputs, {.backend = backend});
    };
    const Results b0 = of_branches({0});
    const Results b1 = of_branches({1});
    const Results b23 = of_branches({2, 3});
    const Results b2 = of_branches({2});
    const Results b3 = of_branches({3});
    expected.out.for_each([&](auto, auto p, auto h, auto c) {
      const Partial one_pass = partial_at(expected, p, h, c);
      const auto at = [&](const Results& results) { return partial_at(results, p, h, c); };
      const Partial chain = merged(merged(merged(at(b0), at(b1)), at(b2)), at(b3));
      const Partial grouped = merged(at(b23), merged(at(b1), at(b0)));
      for (const Partial& got : {chain, grouped}) {
        ASSERT_NEAR(got.out, one_pass.out, tolerance);
        ASSERT_TRUE(got.lse == one_pass.lse || std::abs(got.lse - one_pass.lse) < tolerance);
      }
    });
  }
}

TEST(Merge,
     M12KeysSplitByAMaskMergeToTheWhole) {  // splits of one branch's keys, as over ranks: T11
  Problem whole = testing::paper_problem(48, 2, 8, {{48, 1}, {24, 2}});
  whole.dtype = DType::kFloat64;
  whole.is_causal = true;
  testing::Inputs inputs = make_inputs(whole, {.amplitude = 1.0});
  const Results expected = testing::run(whole, inputs, {.backend = "reference"});
  Problem half = whole;
  half.has_key_mask = true;
  Results parts[3];
  for (std::int64_t part = 0; part < 3; ++part) {
    inputs.key_mask.clear();
    for (std::int64_t j = 0; j < 48; ++j) {
      inputs.key_mask.push_back(j / 16 == part);
    }
    parts[part] = testing::run(half, inputs, {.backend = "reference"});
  }
  expected.out.for_each([&](auto, auto p, auto h, auto c) {
    const Partial got =
        merged(partial_at(parts[2], p, h, c),
               merged(partial_at(parts[0], p, h, c), partial_at(parts[1], p, h, c)));
    ASSERT_NEAR(got.out, expected.out.at(0, p, h, c), 1e-12);
    ASSERT_NEAR(got.lse, expected.lse.at(0, h, p), 1e-12);
  });
}

}  // namespace
}  // namespace dilated
