// Scores of any size: backward uses the very probabilities that forward normalised.
#include <cmath>
#include <functional>

#include <gtest/gtest.h>

#include "tests/support/materialised.h"
#include "tests/support/random_problem.h"

namespace dilated::testing {
namespace {

constexpr int kDraws = 200;  // of the yardstick, see rule_violation; taken only while it is lucky

TEST(Scores, OneKeyGivesDvalueEqualDoutAtAnyFiniteScore) {
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    for (const double score : {0.0, 46.0, 300.0, -300.0, 1e4, -1e4, 1e6, 1e30, -1e30, 2.3e38}) {
      for (const Merge merge : {Merge::kLse, Merge::kSum, Merge::kMean}) {
        for (const bool lse_grad : {true, false}) {
          if (!lse_grad && merge != Merge::kLse) {
            continue;
          }
          // Isolated rows: every segment holds one. The second branch makes two equal ones.
          for (const std::int64_t branches : {1, 2}) {
            if (branches == 2 && std::abs(score) > 1e6) {
              continue;  // log2(2) is lost beside the residual of such a score
            }
            Problem problem = paper_problem(5, 2, 4, {{1, 1}});
            if (branches == 2) {
              problem.branches.push_back(problem.branches[0]);
            }
            problem.dtype = dtype;
            problem.merge = merge;
            problem.lse_grad = lse_grad;
            problem.scale = score;
            Inputs inputs = make_inputs(problem);
            inputs.query.fill(0.0);
            inputs.key.fill(0.0);
            for (std::int64_t p = 0; p < 5; ++p) {
              for (std::int64_t h = 0; h < 2; ++h) {
                inputs.query.set(0, p, h, 1, 1.0);
                inputs.key.set(0, p, h, 1, 1.0);
              }
            }
            const Results got = run(problem, inputs, {.backend = "cpu"});
            got.dvalue.for_each([&](auto b, auto p, auto h, auto c) {
              const double expected =
                  inputs.dout.at(b, p, h, c) * (merge == Merge::kSum ? double(branches) : 1.0);
              ASSERT_EQ(got.dvalue.at(b, p, h, c), round_to(dtype, expected))
                  << score << " " << name_of(merge);
            });
          }
        }
      }
    }
  }
}

/// Changes inputs so that scores get the size that a test is about.
using Shape = std::function<void(Inputs&)>;

/// The rule, with a yardstick over other inputs of the same size, and over the same ones with their
/// sums in another order: where two scores tie, both are rarely as sensitive as this input.
/// With one channel nothing is summed and the yardstick is exact by construction: left out.
std::string violation(const Problem& problem, Inputs inputs, const Shape& shape) {
  if (problem.head_dim == 1) {
    return "";
  }
  shape(inputs);
  return rule_violation(problem, inputs, run(problem, inputs, {.backend = "cpu"}), kDraws,
                        [&](int draw) {
                          if (draw % 2 == 0) {
                            return reordered(inputs, draw);
                          }
                          Inputs other = other_inputs(problem, inputs, draw);
                          shape(other);
                          return other;
                        });
}

/// Random problems whose scores have about the standard deviation `deviation`.
void expect_rule_at(double deviation, DType dtype, std::int64_t max_head_dim, int count) {
  check_property("large scores", count, {.dtype = dtype, .max_head_dim = max_head_dim},
                 [deviation](const RandomCase& drawn) {
                   Problem problem = drawn.problem;
                   // Entries are uniform in [-1.5, 1.5): variance 3/4, of a product 9/16.
                   problem.scale =
                       deviation / std::sqrt(0.5625 * static_cast<double>(problem.head_dim));
                   return violation(problem, drawn.inputs, [](Inputs&) {});
                 });
}

TEST(Scores, TheRuleHoldsForLargeOnes) {
  for (const double deviation : {3.0, 5.0, 15.0, 50.0, 500.0, 3000.0}) {
    for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
      SCOPED_TRACE(std::string(name_of(dtype)) + ", deviation " + std::to_string(deviation));
      expect_rule_at(deviation, dtype, 40, 100);
      expect_rule_at(deviation, dtype, 256, 20);
    }
  }
}

/// All scores near +s or -s: nothing but differences of large numbers.
TEST(Scores, TheRuleHoldsAroundOneLargeValue) {
  for (const double offset : {46.0, 300.0, -300.0, 1e4, -1e4}) {
    for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
      check_property("scores around a value", 60, {.dtype = dtype},
                     [offset](const RandomCase& drawn) {
                       Problem problem = drawn.problem;
                       problem.scale = 1.0;
                       return violation(problem, drawn.inputs, [offset](Inputs& inputs) {
                         inputs.query.for_each([&](auto b, auto p, auto h, auto c) {
                           if (c == 0) {
                             inputs.query.set(b, p, h, c, offset / 8.0);
                           }
                         });
                         inputs.key.for_each([&](auto b, auto p, auto h, auto c) {
                           if (c == 0) {
                             inputs.key.set(b, p, h, c, 8.0);
                           }
                         });
                       });
                     });
    }
  }
}

}  // namespace
}  // namespace dilated::testing
