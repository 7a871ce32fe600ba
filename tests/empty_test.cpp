// R8 and 14: a table of empty and extreme problems, forward and backward: right shape,
// zeros, L = -inf.
#include <functional>
#include <limits>

#include <gtest/gtest.h>

#include "tests/support/materialised.h"

namespace dilated {
namespace {

using testing::Inputs;
using testing::make_inputs;
using testing::Results;

struct EmptyCase {
  const char* name;
  Problem problem;
};

Problem with(Problem problem, const std::function<void(Problem&)>& change) {
  change(problem);
  return problem;
}

/// Every way in which a call has nothing to compute. No output may be anything but zero.
std::vector<EmptyCase> empty_cases() {
  const Problem base = testing::paper_problem(12, 2, 8, {{4, 1}, {12, 2}});
  return {
      {"no tokens", with(base, [](Problem& p) { p.seqlen = 0; })},
      {"batch 0", with(base, [](Problem& p) { p.batch = 0; })},
      {"no heads", with(base,
                        [](Problem& p) {
                          p.num_heads = 0;
                          p.num_kv_heads = 0;
                          p.branches[0].offsets.clear();
                          p.branches[1].offsets.clear();
                        })},
      {"no query heads", with(base,
                              [](Problem& p) {
                                p.num_heads = 0;
                                p.branches[0].offsets.clear();
                                p.branches[1].offsets.clear();
                              })},
      {"no sequences", with(base,
                            [](Problem& p) {
                              p.seqlen = 0;
                              p.cu_seqlens = {0};
                            })},
      {"only empty sequences", with(base,
                                    [](Problem& p) {
                                      p.seqlen = 0;
                                      p.cu_seqlens = {0, 0, 0};
                                    })},
      {"no head runs a branch", with(base,
                                     [](Problem& p) {
                                       p.branches[0].offsets = {-1, -1};
                                       p.branches[1].offsets = {-1, -1};
                                     })},
      {"residues beyond the segment", with(base,
                                           [](Problem& p) {  // o >= w
                                             p.branches = {{3, 8, {5, 7}}};
                                           })},
      {"residues beyond the sequence", with(base,
                                            [](Problem& p) {  // r > n
                                              p.branches = {{100, 64, {50, 63}}};
                                            })},
  };
}

TEST(Empty, NothingToComputeGivesZeros) {
  for (const EmptyCase& empty : empty_cases()) {
    for (const char* backend : {"cpu", "reference"}) {
      for (const Merge merge : {Merge::kLse, Merge::kSum, Merge::kMean}) {
        for (const Tail tail : {Tail::kMask, Tail::kPhantom}) {
          SCOPED_TRACE(std::string(empty.name) + " on " + backend);
          Problem problem = empty.problem;
          problem.merge = merge;
          problem.tail = tail;
          const Inputs inputs = make_inputs(problem, {.with_dlse = true});
          const Results got = testing::run(problem, inputs, {.backend = backend});
          got.lse.for_each([&](auto i, auto h, auto p, auto) {
            ASSERT_EQ(got.lse.at(i, h, p), -std::numeric_limits<double>::infinity());
          });
          for (const testing::Tensor* tensor : {&got.out, &got.dquery, &got.dkey, &got.dvalue}) {
            tensor->for_each(
                [&](auto i, auto p, auto h, auto c) { ASSERT_EQ(tensor->at(i, p, h, c), 0.0); });
          }
        }
      }
    }
  }
}

TEST(Empty, SequencesOfLengthZeroAndOneAmongOthers) {
  for (const bool is_causal : {false, true}) {
    Problem problem = testing::paper_problem(20, 4, 4, {{4, 1}, {8, 2}});
    problem.cu_seqlens = {0, 0, 7, 7, 8, 8, 20, 20};
    problem.is_causal = is_causal;
    const Inputs inputs = make_inputs(problem);
    EXPECT_EQ(difference(testing::run(problem, inputs, {.backend = "cpu"}),
                         testing::materialised(problem, inputs, DType::kFloat64), 1e-5),
              "");
  }
}

TEST(Empty, ASegmentLongerThanTheSequenceActsAsOne) {  // T5, R14: w = 2^40 equals w = n
  for (const char* backend : {"cpu", "reference"}) {
    for (const Merge merge : {Merge::kLse, Merge::kSum}) {
      Problem huge = testing::paper_problem(
          70, 3, 8, {{std::int64_t{1} << 40, 1}, {std::int64_t{1} << 40, 3}});
      huge.merge = merge;
      huge.tail = Tail::kPhantom;
      Problem exact = huge;
      exact.branches[0].segment = 70;
      exact.branches[1].segment = 70;
      const Inputs inputs = make_inputs(huge);
      EXPECT_EQ(bit_difference(testing::run(huge, inputs, {.backend = backend}),
                               testing::run(exact, inputs, {.backend = backend})),
                "");
      EXPECT_EQ(count_pairs(huge), count_pairs(exact));
    }
  }
}

TEST(Empty, ADilationOfTwoToTheForty) {
  Problem problem =
      testing::paper_problem(9, 2, 4, {{std::int64_t{1} << 40, std::int64_t{1} << 40}, {4, 1}});
  problem.merge = Merge::kMean;
  const Inputs inputs = make_inputs(problem);
  EXPECT_EQ(difference(testing::run(problem, inputs, {.backend = "cpu"}),
                       testing::materialised(problem, inputs, DType::kFloat64), 1e-5),
            "");
}

}  // namespace
}  // namespace dilated
