// Partial results: the public merge, float32 results of 16-bit inputs, heads of a shard, saved
// rows.
#include <cmath>
#include <limits>

#include <gtest/gtest.h>

#include "dilated/error.h"
#include "dilated/merge.h"
#include "dilated/options.h"

#include "tests/support/materialised.h"
#include "tests/support/random_problem.h"
#include "tests/support/threads.h"

namespace dilated::testing {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

/// `count` partial results of shape (2, 3, 2, 5), some of whose rows are absent and hold NaN.
struct Parts {
  std::vector<Tensor> outs;
  std::vector<Tensor> lses;

  Parts(int count, DType dtype) {
    for (int i = 0; i < count; ++i) {
      Tensor out(dtype, {2, 3, 2, 5});
      Tensor lse(dtype == DType::kFloat64 ? dtype : DType::kFloat32, {2, 2, 3, 1});
      std::uint64_t at = 0;
      out.for_each([&](auto b, auto p, auto h, auto c) {
        const bool absent = (b + p + h + i) % 3 == 0 || p == 2;  // rows p = 2 everywhere
        out.set(b, p, h, c, absent ? kNan : val(static_cast<std::uint64_t>(20 + i), at++));
        lse.set(b, h, p, 0,
                absent ? -kInfinity : 3.0 * val(static_cast<std::uint64_t>(40 + i), at));
      });
      outs.push_back(out);
      lses.push_back(lse);
    }
  }

  std::vector<Partial> views(std::initializer_list<std::size_t> order) const {
    std::vector<Partial> partials;
    for (const std::size_t i : order) {
      partials.push_back({outs[i].view(), lses[i].rows()});
    }
    return partials;
  }
};

struct Merged {
  Tensor out, lse;
};

Merged merged(const std::vector<Partial>& parts, DType dtype) {
  Merged result{Tensor(dtype, {2, 3, 2, 5}), Tensor(parts.front().lse.dtype, {2, 2, 3, 1})};
  merge(parts, result.out.view(), result.lse.rows());
  return result;
}

TEST(PublicMerge, EqualsItsFormulaInAnyOrder) {
  for (const DType dtype : {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16}) {
    const Parts parts(3, dtype);
    const DType result_dtype = dtype == DType::kFloat64 ? dtype : DType::kFloat32;
    const Merged got = merged(parts.views({0, 1, 2}), result_dtype);
    got.out.for_each([&](auto b, auto p, auto h, auto c) {
      double sum = 0.0;
      double out = 0.0;
      for (std::size_t i = 0; i < 3; ++i) {
        const double weight = std::exp(parts.lses[i].at(b, h, p));
        sum += weight;
        out += weight > 0.0 ? weight * parts.outs[i].at(b, p, h, c) : 0.0;
      }
      ASSERT_NEAR(got.out.at(b, p, h, c), sum > 0.0 ? out / sum : 0.0, 1e-6);
      ASSERT_TRUE(sum > 0.0 ? std::abs(got.lse.at(b, h, p) - std::log(sum)) < 1e-6
                            : got.lse.at(b, h, p) == -kInfinity);
    });
    const Merged other = merged(parts.views({2, 0, 1}), result_dtype);
    EXPECT_EQ(difference(other.out, got.out, 1e-7), "");
    EXPECT_EQ(difference(other.lse, got.lse, 1e-7), "");
    EXPECT_EQ(difference(merged(parts.views({0, 1, 2}), DType::kBFloat16).out,
                         got.out.converted(DType::kBFloat16), 0.0),
              "");  // rounded once
  }
}

TEST(PublicMerge, GradientsEqualFiniteDifferences) {
  const Parts parts(3, DType::kFloat64);
  Tensor dout(DType::kFloat64, {2, 3, 2, 5});
  Tensor dlse(DType::kFloat64, {2, 2, 3, 1});
  std::uint64_t at = 0;
  dout.for_each([&](auto b, auto p, auto h, auto c) { dout.set(b, p, h, c, val(70, at++)); });
  dlse.for_each([&](auto b, auto h, auto p, auto c) { dlse.set(b, h, p, c, val(71, at++)); });
  const auto loss = [&](const Parts& given) {
    const Merged got = merged(given.views({0, 1, 2}), DType::kFloat64);
    double sum = 0.0;
    got.out.for_each([&](auto b, auto p, auto h, auto c) {
      sum += got.out.at(b, p, h, c) * dout.at(b, p, h, c);
      if (c == 0 && got.lse.at(b, h, p) != -kInfinity) {
        sum += got.lse.at(b, h, p) * dlse.at(b, h, p);
      }
    });
    return sum;
  };
  std::vector<Tensor> douts(3, Tensor(DType::kFloat64, {2, 3, 2, 5}));
  std::vector<Tensor> dlses(3, Tensor(DType::kFloat64, {2, 2, 3, 1}));
  std::vector<PartialGradient> gradients;
  for (std::size_t i = 0; i < 3; ++i) {
    gradients.push_back({douts[i].view(), dlses[i].rows()});
  }
  merge_backward(parts.views({0, 1, 2}), std::as_const(dout).view(), std::as_const(dlse).rows(),
                 gradients);
  const double step = 1e-6;
  const auto slope = [&](Tensor& tensor, auto i, auto j, auto k, auto c, Parts& moved) {
    const double x = tensor.at(i, j, k, c);
    tensor.set(i, j, k, c, x + step);
    const double above = loss(moved);
    tensor.set(i, j, k, c, x - step);
    const double below = loss(moved);
    tensor.set(i, j, k, c, x);
    return (above - below) / (2.0 * step);
  };
  Parts moved = parts;
  for (std::size_t i = 0; i < 3; ++i) {
    moved.lses[i].for_each([&](auto b, auto h, auto p, auto c) {
      const bool absent = parts.lses[i].at(b, h, p) == -kInfinity;
      const double expected = absent ? 0.0 : slope(moved.lses[i], b, h, p, c, moved);
      ASSERT_NEAR(dlses[i].at(b, h, p, c), expected, 1e-7);
      for (std::int64_t k = 0; k < 5; ++k) {
        ASSERT_NEAR(douts[i].at(b, p, h, k), absent ? 0.0 : slope(moved.outs[i], b, p, h, k, moved),
                    1e-7);
      }
    });
  }
}

TEST(PublicMerge, RefusesWhatItCannotMerge) {
  const Parts parts(2, DType::kFloat32);
  Tensor out(DType::kFloat32, {2, 3, 2, 5});
  Tensor lse(DType::kFloat32, {2, 2, 3, 1});
  const auto message = [&](const std::vector<Partial>& given) {
    try {
      merge(given, out.view(), lse.rows());
    } catch (const InvalidProblem& error) {
      return std::string(error.what());
    }
    return std::string("no error");
  };
  EXPECT_EQ(message({}), "merge: parts: expected at least one partial result, got none");
  std::vector<Partial> views = parts.views({0, 1});
  views[1].lse.shape[2] = 2;
  EXPECT_EQ(message(views), "merge: parts[1].lse: expected shape (2, 2, 3), got (2, 2, 2)");
  views = parts.views({0, 1});
  views[1].out = std::as_const(out).view();
  EXPECT_EQ(message(views),
            "merge: out: expected memory apart from parts, got overlapping memory (outputs are "
            "written while inputs are read)");
}

TEST(PartialResults, FloatOutputsOfHalfInputsAreRoundedOnlyAtTheEnd) {
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {
    check_property("unrounded", 100, {.dtype = dtype}, [dtype](const RandomCase& drawn) {
      const Results rounded = run(drawn.problem, drawn.inputs, {.backend = "cpu"});
      const Results exact = run(drawn.problem, drawn.inputs, {.backend = "cpu", .unrounded = true});
      for (const NamedResult& result : kResults) {
        // Delta = dO.O takes out as it was stored: only out itself and dvalue are the same numbers.
        if (result.name == "out" || result.name == "dvalue" || result.name == "lse") {
          const Tensor& tensor = exact.*result.member;
          const std::string text = bit_difference(
              result.name == "lse" ? tensor : tensor.converted(dtype), rounded.*result.member);
          if (!text.empty()) {
            return std::string(result.name) + text;
          }
        }
      }
      return rule_violation(drawn.problem, drawn.inputs, exact, 32);
    });
  }
}

/// Heads [first, first + count) of a tensor.
Tensor heads_of(const Tensor& tensor, std::int64_t first, std::int64_t count) {
  Tensor part(tensor.dtype(), {tensor.shape()[0], tensor.shape()[1], count, tensor.shape()[3]});
  part.for_each(
      [&](auto b, auto p, auto h, auto c) { part.set(b, p, h, c, tensor.at(b, p, first + h, c)); });
  return part;
}

TEST(HeadShards, FourHeadsAsTwoAndTwoAreTheSameBits) {
  for (const char* rule : {"paper", "torchscale", "branch", "zero"}) {
    for (const char* groups : {"none", "cumulative", "literal"}) {
      for (const std::int64_t kv_heads : {8, 4, 2}) {
        Options options{
            .segments = {16, 40}, .dilations = {1, 4}, .offsets = rule, .groups = groups};
        options.dropout_p = 0.3;
        const Shapes shapes{.seqlen = 60, .num_heads = 8, .num_kv_heads = kv_heads, .head_dim = 6};
        const Problem whole = make_problem(options, shapes);
        const Inputs inputs = make_inputs(whole, {.amplitude = 1.0});
        const Results expected = run(whole, inputs);
        for (std::int64_t rank = 0; rank < 2; ++rank) {
          options.head_offset = 4 * rank;
          options.total_heads = 8;
          Shapes shard = shapes;
          shard.num_heads = 4;
          shard.num_kv_heads = kv_heads / 2;
          Inputs part = inputs;
          part.query = heads_of(inputs.query, 4 * rank, 4);
          part.dout = heads_of(inputs.dout, 4 * rank, 4);
          part.key = heads_of(inputs.key, kv_heads / 2 * rank, kv_heads / 2);
          part.value = heads_of(inputs.value, kv_heads / 2 * rank, kv_heads / 2);
          const Results got = run(make_problem(options, shard), part);
          EXPECT_EQ(bit_difference(got.out, heads_of(expected.out, 4 * rank, 4)), "") << rule;
          EXPECT_EQ(bit_difference(got.dquery, heads_of(expected.dquery, 4 * rank, 4)), "");
          EXPECT_EQ(
              bit_difference(got.dkey, heads_of(expected.dkey, kv_heads / 2 * rank, kv_heads / 2)),
              "");
        }
      }
    }
  }
}

TEST(HeadShards, ReplicatedKvHeadsNeedTheirTotal) {
  // 8 query heads on 2 kv heads over 4 ranks: every rank holds 2 query heads and a copy of one kv
  // head.
  const Options whole{.segments = {40}, .dilations = {4}};
  Options shard = whole;
  shard.total_heads = 8;
  shard.total_kv_heads = 2;
  const std::vector<std::int64_t> all = build_offsets(whole, 8, 2);
  for (std::int64_t rank = 0; rank < 4; ++rank) {
    shard.head_offset = 2 * rank;
    const auto first = all.begin() + 2 * rank;
    EXPECT_EQ(build_offsets(shard, 2, 1), std::vector<std::int64_t>(first, first + 2));
  }
  shard.total_kv_heads = 3;
  EXPECT_THROW(build_offsets(shard, 2, 1), InvalidProblem);
  shard.total_kv_heads = 2;
  shard.head_offset = 7;
  EXPECT_THROW(build_offsets(shard, 2, 1), InvalidProblem);
}

TEST(SavedBranches, EveryRowIsWritten) {
  for (const char* backend : {"cpu", "reference"}) {
    check_property(
        "saved rows", 150, {.dtype = DType::kFloat32}, [backend](const RandomCase& drawn) {
          const Problem& problem = drawn.problem;
          const Plan plan = make_plan(problem, backend);
          const std::int64_t rows = plan.branch_rows();
          Tensor out(problem.dtype, drawn.inputs.query.shape());
          Tensor lse(problem.dtype, {problem.batch, problem.num_heads, problem.seqlen, 1});
          Tensor branch_out(DType::kFloat32,
                            {problem.batch, problem.num_heads, rows, problem.head_dim});
          Tensor branch_lse(DType::kFloat32, {problem.batch, problem.num_heads, rows, 2});
          forward(plan, {drawn.inputs.query.view(),
                         drawn.inputs.key.view(),
                         drawn.inputs.value.view(),
                         drawn.inputs.masks(problem),
                         out.view(),
                         lse.rows(),
                         {},
                         branch_out.view(),
                         branch_lse.view()});
          std::string text;
          if (problem.seqlen == 0) {
            return text;
          }
          branch_out.for_each([&](auto b, auto h, auto row, auto c) {
            const double value = branch_lse.at(b, h, row);
            if (std::isnan(branch_out.at(b, h, row, c)) || std::isnan(value) ||
                std::isnan(branch_lse.at(b, h, row, 1)) ||
                (value == -kInfinity && branch_out.at(b, h, row, c) != 0.0)) {
              text = "row " + std::to_string(row) + " was not written";
            }
          });
          return text;
        });
  }
}

/// Threads that lie about their number.
class Lying final : public ParallelFor {
 public:
  explicit Lying(int threads) : threads_(threads) {}
  int num_threads() const override { return threads_; }
  void run(int threads, const Body& body) const override {
    for (int thread = 0; thread < threads; ++thread) {
      body(thread);
    }
  }

 private:
  int threads_;
};

TEST(Threads, ImpossibleNumbersAreRefused) {
  Problem problem = paper_problem(16, 2, 4, {{8, 1}});
  problem.device.units = 3;
  const Inputs inputs = make_inputs(problem);
  const Plan plan = make_plan(problem);
  for (const int threads : {0, -1, 4, std::numeric_limits<int>::max()}) {
    const Lying parallel_for(threads);
    try {
      run(plan, inputs, {.parallel_for = &parallel_for});
      FAIL();
    } catch (const InvalidProblem& error) {
      EXPECT_EQ(error.argument(), "parallel_for");
      EXPECT_EQ(std::string(error.what()),
                "forward: parallel_for: expected 1 to 3 threads, got " + std::to_string(threads) +
                    " (device.units of the problem says for how many threads the plan has "
                    "scratch)");
    }
  }
  const Lying three(3);
  EXPECT_EQ(bit_difference(run(plan, inputs, {.parallel_for = &three}), run(plan, inputs)), "");
}

TEST(Decisions, ArePrintedAndNeedNoDevice) {
  Problem problem = paper_problem(5000, 2, 64, {{1024, 1}, {4096, 4}});
  problem.device.units = 2;
  problem.alignment = 16;
  const std::string text = make_plan(problem, "cpu").to_string();
  for (const char* line : {"device        cpu, 2 threads\n", "alignment     16 bytes\n",
                           "threads       2\n", "branch order  [0, 1]\n",
                           "forward       items of 256 positions, 1536 rows of a class at a time\n",
                           "backward      1024 rows of a class at a time\n"}) {
    EXPECT_NE(text.find(line), std::string::npos) << line << "is not in\n" << text;
  }
}

TEST(Alignment, IsCheckedAgainstTheViews) {
  Problem problem = paper_problem(16, 2, 4, {{8, 1}});
  problem.alignment = 32;  // rows of one head are 16 bytes
  try {
    run(problem, make_inputs(problem));
    FAIL();
  } catch (const InvalidProblem& error) {
    EXPECT_EQ(error.argument(), "query");
  }
  problem.alignment = 16;
  run(problem, make_inputs(problem));
}

TEST(Alignment, OfNothingIsNeverWrong) {
  Problem problem = paper_problem(0, 2, 4, {{8, 1}});
  problem.alignment = 16;
  alignas(16) std::array<float, 8> memory{};
  float* const odd = memory.data() + 1;
  ForwardTensors tensors;
  tensors.query = tensors.key = tensors.value = {odd, DType::kFloat32, {1, 0, 2, 4}, {8, 8, 4, 1}};
  tensors.out = {odd, DType::kFloat32, {1, 0, 2, 4}, {8, 8, 4, 1}};
  tensors.lse = {odd, DType::kFloat32, {1, 2, 0}, {2, 1, 1}};
  forward(make_plan(problem), tensors);
}

TEST(Outputs, OfOneInterleavedTensorAreNoOverlap) {
  // Gradients of a packed (seqlen, 3, heads, head_dim) projection: views that interleave.
  Problem problem = paper_problem(40, 2, 8, {{8, 1}, {40, 3}});
  const Inputs inputs = make_inputs(problem);
  const Plan plan = make_plan(problem);
  const Results expected = run(plan, inputs);
  Tensor packed(DType::kFloat32, {1, 40, 6, 8});
  const auto third = [&](std::int64_t index) {
    TensorView view = packed.view();
    view.data = static_cast<float*>(view.data) + index * 2 * 8;
    view.shape[2] = 2;
    return view;
  };
  Tensor out(DType::kFloat32, inputs.query.shape());
  Tensor lse(DType::kFloat32, {1, 2, 40, 1});
  Tensor residual = lse;
  forward(plan, {inputs.query.view(),
                 inputs.key.view(),
                 inputs.value.view(),
                 {},
                 out.view(),
                 lse.rows(),
                 residual.rows(),
                 {},
                 {}});
  BackwardTensors tensors;
  tensors.lse_residual = std::as_const(residual).rows();
  tensors.dout = inputs.dout.view();
  tensors.query = inputs.query.view();
  tensors.key = inputs.key.view();
  tensors.value = inputs.value.view();
  tensors.out = expected.out.view();
  tensors.lse = expected.lse.rows();
  tensors.dquery = third(0);
  tensors.dkey = third(1);
  tensors.dvalue = third(2);
  backward(plan, tensors);
  EXPECT_EQ(bit_difference(heads_of(packed, 0, 2), expected.dquery), "");
  EXPECT_EQ(bit_difference(heads_of(packed, 2, 2), expected.dkey), "");
  EXPECT_EQ(bit_difference(heads_of(packed, 4, 2), expected.dvalue), "");
  tensors.dvalue.data = static_cast<float*>(tensors.dvalue.data) - 1;  // into the row before
  EXPECT_THROW(backward(plan, tensors), InvalidProblem);
}

TEST(Counts, DoNotWrap) {
  Problem problem = paper_problem(std::int64_t{1} << 32, 1, 64, {{std::int64_t{1} << 40, 1}});
  for (const std::int64_t n : {std::int64_t{1} << 32, std::int64_t{3'037'000'500}}) {
    problem.seqlen = n;
    EXPECT_THROW(count_pairs(problem), InvalidProblem) << n;
  }
  problem.seqlen = 3'037'000'499;
  EXPECT_EQ(count_pairs(problem)[0], std::int64_t{3'037'000'499} * 3'037'000'499);
}

}  // namespace
}  // namespace dilated::testing
