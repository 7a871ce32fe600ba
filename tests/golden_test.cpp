// The oracle's 27 golden cases and digests (semantics §11): outputs and gradients of the reference
// back end in float64 at 1e-12 * max(1, |x|); gradients of lse against the C++ restatement of the
// oracle. tests/data holds copies of the specification's oracle/golden_dilated.json and
// tests/data/ref_dilated.py.
#include <algorithm>
#include <cmath>
#include <fstream>
#include <limits>
#include <map>
#include <sstream>

#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include "tests/support/materialised.h"

namespace dilated {
namespace {

using nlohmann::json;
using testing::Inputs;
using testing::make_inputs;
using testing::Results;
using testing::Tensor;

constexpr double kTolerance = 1e-12;

struct GoldenCase {
  std::string name;
  Problem problem;
  Inputs inputs;
  bool column_sums = false;
  json expected;
};

std::int64_t offset_of(const json& rule, const std::string& gqa, std::int64_t b, std::int64_t h,
                       std::int64_t heads, std::int64_t group, std::int64_t r) {
  if (gqa == "kv") {
    h /= group;
    heads /= group;
  }
  if (rule == "paper") {
    return h % r;
  }
  if (rule == "torchscale") {
    return h / ((heads + r - 1) / r);
  }
  if (rule == "branch") {
    return b % r;
  }
  throw std::logic_error("unknown rule " + rule.dump());
}

GoldenCase parse_case(const json& item) {
  GoldenCase golden;
  golden.name = item["name"];
  golden.expected = item["out"];
  const json& cfg = item["cfg"];
  golden.column_sums = cfg["colsum"];
  Problem& problem = golden.problem;
  problem.dtype = DType::kFloat64;
  problem.seqlen = item["n"];
  problem.num_heads = item["H"];
  problem.num_kv_heads = item["Hk"];
  problem.head_dim = item["d"];
  const std::int64_t group = problem.num_heads / problem.num_kv_heads;
  for (std::size_t b = 0; b < cfg["segments"].size(); ++b) {
    Branch branch{cfg["segments"][b], cfg["dilations"][b], {}};
    for (std::int64_t h = 0; h < problem.num_heads; ++h) {
      const bool all = cfg["assign"].is_string();
      const bool runs = all || std::ranges::count(cfg["assign"][b], json(h)) > 0;
      branch.offsets.push_back(runs ? offset_of(cfg["offset"], cfg["gqa_offset"],
                                                static_cast<std::int64_t>(b), h, problem.num_heads,
                                                group, branch.dilation)
                                    : -1);
    }
    problem.branches.push_back(branch);
  }
  const std::map<std::string, Merge> merges = {
      {"lse", Merge::kLse}, {"sum", Merge::kSum}, {"mean", Merge::kMean}};
  problem.merge = merges.at(cfg["merge"]);
  problem.out_scale = cfg["out_scale"];
  problem.lse_grad = cfg["lse_grad"];
  problem.tail = cfg["tail"] == "phantom" ? Tail::kPhantom : Tail::kMask;
  problem.is_causal = cfg["causal"];
  if (!cfg["scale"].is_null()) {
    problem.scale = cfg["scale"].get<double>();
  }
  if (!item["cu_seqlens"].is_null()) {
    problem.cu_seqlens = item["cu_seqlens"].get<std::vector<std::int64_t>>();
  }
  problem.has_key_mask = !item["key_mask"].is_null();
  golden.inputs = make_inputs(problem, {});
  if (problem.has_key_mask) {
    golden.inputs.key_mask.clear();
    for (const json& keep : item["key_mask"]) {
      golden.inputs.key_mask.push_back(keep.get<bool>() ? 1 : 0);
    }
  }
  return golden;
}

std::vector<GoldenCase> golden_cases() {
  std::ifstream file(std::string(DILATED_TEST_DATA) + "/golden_dilated.json");
  std::vector<GoldenCase> cases;
  for (const json& item : json::parse(file)) {
    cases.push_back(parse_case(item));
  }
  return cases;
}

double number(const json& item) {
  return item.is_null() ? -std::numeric_limits<double>::infinity() : item.get<double>();
}

const json& entry(const json& list, std::int64_t i) { return list[static_cast<std::size_t>(i)]; }

/// JSON [position][head][channel] as (1, n, H, d).
Tensor tokens(const json& rows, const Tensor& like) {
  Tensor tensor(DType::kFloat64, like.shape());
  tensor.for_each([&](auto i, auto p, auto h, auto c) {
    tensor.set(i, p, h, c, number(entry(entry(entry(rows, p), h), c)));
  });
  return tensor;
}

/// JSON [position][head] as (1, H, n, 1).
Tensor rows_of(const json& rows, const Tensor& like) {
  Tensor tensor(DType::kFloat64, like.shape());
  tensor.for_each([&](auto i, auto h, auto p, auto c) {
    tensor.set(i, h, p, c, number(entry(entry(rows, p), h)));
  });
  return tensor;
}

/// sum_i x_i val(777, i) over (position, head, channel), -inf skipped.
double digest(const Tensor& tensor, bool is_lse) {
  double sum = 0.0;
  const auto& shape = tensor.shape();
  tensor.for_each([&](auto i, auto j, auto k, auto c) {
    const std::int64_t index = is_lse ? k * shape[1] + j : (j * shape[2] + k) * shape[3] + c;
    const double x = tensor.at(i, j, k, c);
    sum += std::isinf(x) ? 0.0 : x * testing::val(777, static_cast<std::uint64_t>(index));
  });
  return sum;
}

/// The table between #DIGESTS-BEGIN and #DIGESTS-END of the oracle script.
std::map<std::string, std::vector<double>> digests_of_the_script() {
  std::ifstream file(std::string(DILATED_TEST_DATA) + "/ref_dilated.py");
  std::map<std::string, std::vector<double>> digests;
  bool is_table = false;
  for (std::string line; std::getline(file, line);) {  //     'name': (o, lse, dq, dk, dv),
    is_table = line != "#DIGESTS-END" && (is_table || line == "#DIGESTS-BEGIN");
    const std::size_t open = line.find("': (");
    if (is_table && open != std::string::npos) {
      const std::string name = line.substr(line.find('\'') + 1, open - line.find('\'') - 1);
      std::stringstream numbers(line.substr(open + 4, line.rfind(')') - open - 4));
      for (std::string item; std::getline(numbers, item, ',');) {
        digests[name].push_back(std::stod(item));
      }
    }
  }
  return digests;
}

/// Problem of branch b alone: O_b, l_b and their backward.
Problem single_branch(const Problem& problem, std::size_t b) {
  Problem single = problem;
  single.branches = {problem.branches[b]};
  single.merge = Merge::kSum;
  single.out_scale = 1.0;
  return single;
}

/// Preset fkodom's division by column sums, composed of single-branch calls (semantics §4 and §6).
Results run_with_column_sums(const Problem& problem, const Inputs& inputs) {
  Results results =
      testing::run(problem, inputs, {.backend = "reference"});  // lse is that of the plain sum
  for (Tensor* tensor : {&results.out, &results.dquery, &results.dkey, &results.dvalue}) {
    tensor->fill(0.0);
  }
  const auto accumulate = [](Tensor& to, const Tensor& from, const auto& factor) {
    to.for_each([&](auto i, auto p, auto h, auto c) {
      to.set(i, p, h, c, to.at(i, p, h, c) + factor(h, c) * from.at(i, p, h, c));
    });
  };
  for (std::size_t b = 0; b < problem.branches.size(); ++b) {
    const Problem single = single_branch(problem, b);
    const Tensor out = testing::run(single, inputs, {.backend = "reference"}).out;
    const auto column = [&](std::int64_t h, std::int64_t c, const auto& item) {
      double sum = 0.0;
      for (std::int64_t p = 0; p < problem.seqlen; ++p) {
        sum += item(p, h, c);
      }
      return sum;
    };
    const auto runs = [&](std::int64_t h) {
      return problem.branches[b].offsets[static_cast<std::size_t>(h)] >= 0;
    };
    const auto sum_of = [&](std::int64_t h, std::int64_t c) {
      return column(h, c,
                    [&](auto p, auto head, auto channel) { return out.at(0, p, head, channel); });
    };
    accumulate(results.out, out,
               [&](auto h, auto c) { return runs(h) ? problem.out_scale / sum_of(h, c) : 0.0; });
    Inputs upstream = inputs;
    upstream.dout.for_each([&](auto i, auto p, auto h, auto c) {
      if (!runs(h)) {
        return upstream.dout.set(i, p, h, c, 0.0);
      }
      const double sum = sum_of(h, c);
      const double cross = column(h, c, [&](auto row, auto head, auto channel) {
        return problem.out_scale * inputs.dout.at(0, row, head, channel) *
               out.at(0, row, head, channel);
      });
      upstream.dout.set(i, p, h, c,
                        problem.out_scale * inputs.dout.at(i, p, h, c) / sum - cross / (sum * sum));
    });
    const Results gradients = testing::run(single, upstream, {.backend = "reference"});
    const auto one = [](auto, auto) { return 1.0; };
    accumulate(results.dquery, gradients.dquery, one);
    accumulate(results.dkey, gradients.dkey, one);
    accumulate(results.dvalue, gradients.dvalue, one);
  }
  return results;
}

Results run_case(const GoldenCase& golden) {
  return golden.column_sums ? run_with_column_sums(golden.problem, golden.inputs)
                            : testing::run(golden.problem, golden.inputs, {.backend = "reference"});
}

TEST(Golden, ReferenceEqualsEveryCase) {  // outputs lie in memory poisoned with NaN: T8
  const std::vector<GoldenCase> cases = golden_cases();
  ASSERT_EQ(cases.size(), 27u);
  for (const GoldenCase& golden : cases) {
    SCOPED_TRACE(golden.name);
    const Results got = run_case(golden);
    EXPECT_EQ(difference(got.out, tokens(golden.expected["o"], got.out), kTolerance), "");
    EXPECT_EQ(difference(got.lse, rows_of(golden.expected["lse"], got.lse), kTolerance), "");
    EXPECT_EQ(difference(got.dquery, tokens(golden.expected["dq"], got.dquery), kTolerance), "");
    EXPECT_EQ(difference(got.dkey, tokens(golden.expected["dk"], got.dkey), kTolerance), "");
    EXPECT_EQ(difference(got.dvalue, tokens(golden.expected["dv"], got.dvalue), kTolerance), "");
  }
}

TEST(Golden, ReferenceEqualsEveryDigest) {
  const auto digests = digests_of_the_script();
  ASSERT_EQ(digests.size(), 27u);
  for (const GoldenCase& golden : golden_cases()) {
    SCOPED_TRACE(golden.name);
    const Results got = run_case(golden);
    const std::vector<double> expected = digests.at(golden.name);
    ASSERT_EQ(expected.size(), testing::kResults.size());
    for (std::size_t i = 0; i < expected.size(); ++i) {
      const testing::NamedResult& result = testing::kResults[i];
      EXPECT_NEAR(digest(got.*result.member, result.name == "lse"), expected[i],
                  kTolerance * std::max(1.0, std::abs(expected[i])))
          << result.name;
    }
  }
}

TEST(Golden,
     RestatedOracleEqualsEveryCase) {  // the yardstick of the other tests is itself measured
  for (const GoldenCase& golden : golden_cases()) {
    if (golden.column_sums) {
      continue;
    }
    SCOPED_TRACE(golden.name);
    const Results got = testing::materialised(golden.problem, golden.inputs, DType::kFloat64);
    EXPECT_EQ(difference(got.out, tokens(golden.expected["o"], got.out), kTolerance), "");
    EXPECT_EQ(difference(got.lse, rows_of(golden.expected["lse"], got.lse), kTolerance), "");
    EXPECT_EQ(difference(got.dquery, tokens(golden.expected["dq"], got.dquery), kTolerance), "");
    EXPECT_EQ(difference(got.dkey, tokens(golden.expected["dk"], got.dkey), kTolerance), "");
    EXPECT_EQ(difference(got.dvalue, tokens(golden.expected["dv"], got.dvalue), kTolerance), "");
  }
}

TEST(Golden, GradientsOfLseEqualTheRestatedOracle) {  // dlse = val(5, p H + h)
  for (GoldenCase& golden : golden_cases()) {
    if (golden.column_sums) {
      continue;
    }
    SCOPED_TRACE(golden.name);
    const Inputs plain = golden.inputs;
    golden.inputs = make_inputs(golden.problem, {.with_dlse = true});
    golden.inputs.key_mask = plain.key_mask;
    const Results got = testing::run(golden.problem, golden.inputs, {.backend = "reference"});
    EXPECT_EQ(difference(got, testing::materialised(golden.problem, golden.inputs, DType::kFloat64),
                         kTolerance),
              "");
    if (golden.problem.seqlen >
        1) {  // one key: dS = dL - 0 moves dQ even there, but by 0 for duplicates
      EXPECT_GT(max_error(got.dquery,
                          testing::run(golden.problem, plain, {.backend = "reference"}).dquery),
                1e-3);
    }
  }
}

TEST(Golden, FloatKernelsKeepTheToleranceRule) {
  for (GoldenCase& golden : golden_cases()) {
    golden.problem.dtype = DType::kFloat32;
    const Inputs exact = golden.inputs;
    golden.inputs = make_inputs(golden.problem, {});
    golden.inputs.key_mask = exact.key_mask;
    for (const char* backend : {"cpu", "reference"}) {
      SCOPED_TRACE(golden.name + " on " + backend);
      EXPECT_EQ(testing::rule_violation(
                    golden.problem, golden.inputs,
                    testing::run(golden.problem, golden.inputs, {.backend = backend})),
                "");
    }
  }
}

}  // namespace
}  // namespace dilated
