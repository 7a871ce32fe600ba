// Causal problems: NaN or infinity at position j reaches only what sees it; everything else keeps
// its bits. Hidden pairs are left out of sums, not weighed by zero.
#include <cmath>
#include <limits>

#include <gtest/gtest.h>
#include <rapidcheck.h>

#include "tests/support/random_problem.h"

namespace dilated::testing {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

TEST(NonFinite, ALaterValueDoesNotReachAnEarlierQuery) {
  for (const char* backend : {"cpu", "reference"}) {
    for (const double bad : {kNan, kInfinity}) {
      Problem problem = paper_problem(2, 1, 1, {{2, 1}});
      problem.is_causal = true;
      Inputs inputs = make_inputs(problem);
      inputs.query.fill(0.0);
      inputs.key.fill(0.0);
      inputs.value.set(0, 0, 0, 0, 1.0);
      inputs.value.set(0, 1, 0, 0, bad);
      const Results got = run(problem, inputs, {.backend = backend});
      EXPECT_EQ(got.out.at(0, 0, 0), 1.0);
      EXPECT_FALSE(std::isfinite(got.out.at(0, 1, 0)));
    }
  }
}

/// Which (query, key) of query head h meet in some branch.
bool sees(const Problem& problem, std::int64_t n, std::int64_t h, std::int64_t p, std::int64_t j) {
  for (const Branch& branch : problem.branches) {
    const std::int64_t w = std::min(branch.segment, n);
    const std::int64_t o = branch.offsets[static_cast<std::size_t>(h)];
    if (j <= p && p / w == j / w && p % w % branch.dilation == o && j % w % branch.dilation == o) {
      return true;
    }
  }
  return false;
}

struct Fault {
  Tensor Inputs::* tensor;
  bool is_query_side;
};

/// Puts `bad` into row j of one tensor and compares everything that cannot see it.
std::string leak(const Problem& problem, const Inputs& clean, const Fault& fault, std::int64_t j,
                 std::int64_t head, double bad) {
  const Results expected = run(problem, clean, {.backend = "cpu"});
  Inputs inputs = clean;
  (inputs.*fault.tensor).set(0, j, head, 0, bad);
  const Results got = run(problem, inputs, {.backend = "cpu"});
  const std::int64_t group = problem.heads_per_kv_head();
  const std::int64_t n = problem.seqlen;
  // Query rows (head, p) that are touched: those that see the key, or the row itself.
  const auto query_touched = [&](std::int64_t h, std::int64_t p) {
    return fault.is_query_side ? h == head && p == j
                               : h / group == head && sees(problem, n, h, p, j);
  };
  // A key is touched if a touched query sees it.
  const auto key_touched = [&](std::int64_t kv, std::int64_t k) {
    for (std::int64_t h = kv * group; h < (kv + 1) * group; ++h) {
      for (std::int64_t p = k; p < n; ++p) {
        if (query_touched(h, p) && sees(problem, n, h, p, k)) {
          return true;
        }
      }
    }
    return !fault.is_query_side && kv == head && k == j;
  };
  std::string text;
  const auto compare = [&](const char* name, double a, double b, std::int64_t p, std::int64_t h) {
    if (!(a == b) && text.empty()) {
      text = std::string(name) + " of row " + std::to_string(p) + ", head " + std::to_string(h) +
             " changed by row " + std::to_string(j) + ", head " + std::to_string(head);
    }
  };
  for (std::int64_t h = 0; h < problem.num_heads; ++h) {
    for (std::int64_t p = 0; p < n; ++p) {
      if (query_touched(h, p)) {
        continue;
      }
      compare("lse", got.lse.at(0, h, p), expected.lse.at(0, h, p), p, h);
      for (std::int64_t c = 0; c < problem.head_dim; ++c) {
        compare("out", got.out.at(0, p, h, c), expected.out.at(0, p, h, c), p, h);
        compare("dquery", got.dquery.at(0, p, h, c), expected.dquery.at(0, p, h, c), p, h);
      }
    }
  }
  for (std::int64_t h = 0; h < problem.num_kv_heads; ++h) {
    for (std::int64_t p = 0; p < n; ++p) {
      if (key_touched(h, p)) {
        continue;
      }
      for (std::int64_t c = 0; c < problem.head_dim; ++c) {
        compare("dkey", got.dkey.at(0, p, h, c), expected.dkey.at(0, p, h, c), p, h);
        compare("dvalue", got.dvalue.at(0, p, h, c), expected.dvalue.at(0, p, h, c), p, h);
      }
    }
  }
  return text;
}

TEST(NonFinite, ReachesOnlyWhatSeesIt) {
  const Fault faults[] = {{&Inputs::query, true},
                          {&Inputs::key, false},
                          {&Inputs::value, false},
                          {&Inputs::dout, true}};
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    for (const std::int64_t max_seqlen : {70, 300}) {
      check_property("non-finite values", max_seqlen == 70 ? 150 : 40,
                     {.dtype = dtype, .max_seqlen = max_seqlen, .max_head_dim = 20},
                     [&](const RandomCase& drawn) {
                       if (drawn.problem.seqlen == 0) {
                         return std::string();
                       }
                       Problem problem = drawn.problem;
                       problem.cu_seqlens.clear();
                       problem.batch = 1;
                       problem.is_causal = true;
                       problem.has_seqused = false;
                       problem.has_key_mask = false;
                       InputOptions options{.amplitude = 1.0};
                       options.with_dlse = drawn.inputs.dlse.has_value();
                       const Inputs inputs = make_inputs(problem, options);
                       const Fault fault = faults[*rc::gen::inRange(0, 4)];
                       const std::int64_t heads =
                           fault.is_query_side ? problem.num_heads : problem.num_kv_heads;
                       return leak(problem, inputs, fault,
                                   *rc::gen::inRange<std::int64_t>(0, problem.seqlen),
                                   *rc::gen::inRange<std::int64_t>(0, heads),
                                   *rc::gen::element(kNan, kInfinity, -kInfinity));
                     });
    }
  }
}

}  // namespace
}  // namespace dilated::testing
