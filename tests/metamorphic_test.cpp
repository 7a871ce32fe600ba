// Metamorphic tests M1-M9, M14, M15, M17 (semantics §11), each a line of mathematics, on both CPU
// back ends.
#include <cmath>
#include <limits>
#include <ostream>

#include <gtest/gtest.h>

#include "tests/support/materialised.h"

namespace dilated {
namespace {

using testing::difference;
using testing::Inputs;
using testing::make_inputs;
using testing::Results;
using testing::Tensor;

constexpr double kInfinity = std::numeric_limits<double>::infinity();

/// "reference" in float64 at 1e-11, "cpu" in float32 at 2e-5.
struct Setting {
  const char* backend;
  DType dtype;
  double tolerance;
};

void PrintTo(const Setting& setting, std::ostream* stream) { *stream << setting.backend; }

class Metamorphic : public ::testing::TestWithParam<Setting> {
 protected:
  Problem problem(std::int64_t n, std::int64_t heads, std::int64_t head_dim,
                  const std::vector<std::pair<std::int64_t, std::int64_t>>& branches) const {
    Problem result = testing::paper_problem(n, heads, head_dim, branches);
    result.dtype = GetParam().dtype;
    return result;
  }
  Results run(const Problem& problem, const Inputs& inputs) const {
    return testing::run(problem, inputs, {.backend = GetParam().backend});
  }
  double tolerance() const { return GetParam().tolerance; }
};

INSTANTIATE_TEST_SUITE_P(Backends, Metamorphic,
                         ::testing::Values(Setting{"reference", DType::kFloat64, 1e-11},
                                           Setting{"cpu", DType::kFloat32, 2e-5}),
                         [](const auto& setting) { return std::string(setting.param.backend); });

TEST_P(Metamorphic, M1OneDenseBranchIsSoftmaxAttention) {  // X7
  for (const bool is_causal : {false, true}) {
    Problem dense = problem(37, 2, 5, {{100, 1}});
    dense.is_causal = is_causal;
    const Inputs inputs = make_inputs(dense, {.amplitude = 1.0});
    const Results got = run(dense, inputs);
    for (std::int64_t h = 0; h < 2; ++h) {
      for (std::int64_t p = 0; p < 37; ++p) {
        double sum = 0.0;
        std::vector<double> out(5, 0.0);
        for (std::int64_t j = 0; j < (is_causal ? p + 1 : 37); ++j) {
          double score = 0.0;
          for (std::int64_t c = 0; c < 5; ++c) {
            score += inputs.query.at(0, p, h, c) * inputs.key.at(0, j, h, c);
          }
          const double weight = std::exp(score / std::sqrt(5.0));
          sum += weight;
          for (std::int64_t c = 0; c < 5; ++c) {
            out[static_cast<std::size_t>(c)] += weight * inputs.value.at(0, j, h, c);
          }
        }
        EXPECT_NEAR(got.lse.at(0, h, p), std::log(sum), tolerance());
        for (std::int64_t c = 0; c < 5; ++c) {
          EXPECT_NEAR(got.out.at(0, p, h, c), out[static_cast<std::size_t>(c)] / sum, tolerance());
        }
      }
    }
  }
}

TEST_P(Metamorphic, M2TheBranchListTwiceAddsLogTwo) {  // T10
  Problem once = problem(29, 3, 4, {{8, 1}, {20, 3}});
  Problem twice = once;
  twice.branches.insert(twice.branches.end(), once.branches.begin(), once.branches.end());
  for (const bool lse_grad : {true, false}) {
    once.lse_grad = lse_grad;
    twice.lse_grad = lse_grad;
    const Inputs inputs = make_inputs(once, {.amplitude = 1.0});
    Results expected = run(once, inputs);
    expected.lse.for_each([&](auto i, auto h, auto p, auto c) {
      expected.lse.set(i, h, p, c, expected.lse.at(i, h, p) + std::log(2.0));
    });
    EXPECT_EQ(difference(run(twice, inputs), expected, tolerance()), "");
  }
}

TEST_P(Metamorphic, M3PermutingBranchesChangesNothing) {
  for (const Merge merge : {Merge::kLse, Merge::kSum, Merge::kMean}) {
    Problem first = problem(41, 4, 6, {{8, 1}, {20, 3}, {41, 4}, {13, 2}});
    first.merge = merge;
    Problem second = first;
    std::swap(second.branches[0], second.branches[3]);
    std::swap(second.branches[1], second.branches[2]);
    const Inputs inputs = make_inputs(first, {.amplitude = 1.0, .with_dlse = true});
    EXPECT_EQ(difference(run(first, inputs), run(second, inputs), tolerance()), "");
  }
}

TEST_P(Metamorphic, M4ChunksOfTheLongestSegmentAreIndependent) {  // T14
  Problem whole = problem(48, 4, 4, {{4, 1}, {8, 2}, {16, 4}});
  whole.is_causal = true;
  const Inputs inputs = make_inputs(whole, {.amplitude = 1.0});
  const Results expected = run(whole, inputs);
  for (std::int64_t chunk = 0; chunk < 3; ++chunk) {
    Problem part = whole;
    part.seqlen = 16;
    Inputs rows = inputs;
    for (Tensor* tensor : {&rows.query, &rows.key, &rows.value, &rows.dout}) {
      *tensor = tensor->slice(16 * chunk, 16 * chunk + 16);
    }
    const Results got = run(part, rows);
    EXPECT_EQ(difference(got.out, expected.out.slice(16 * chunk, 16 * chunk + 16), tolerance()),
              "");
    EXPECT_EQ(difference(got.dkey, expected.dkey.slice(16 * chunk, 16 * chunk + 16), tolerance()),
              "");
    // A causal token at a common multiple of the segments sees only itself.
    EXPECT_NEAR(got.out.at(0, 0, 0, 0), rows.value.at(0, 0, 0, 0), tolerance());
  }
}

TEST_P(Metamorphic, M5PhantomEqualsZeroPaddingWithAMask) {
  for (const std::int64_t n : {5, 9, 13, 17, 23}) {
    Problem phantom = problem(n, 4, 4, {{4, 1}, {4, 2}, {4, 4}});
    phantom.tail = Tail::kPhantom;
    Problem padded = phantom;
    padded.tail = Tail::kMask;
    padded.seqlen = (n + 3) / 4 * 4;
    const Inputs inputs = make_inputs(phantom, {.amplitude = 1.0});
    Inputs zeros = inputs;
    for (Tensor* tensor : {&zeros.query, &zeros.key, &zeros.value, &zeros.dout}) {
      Tensor longer(tensor->dtype(), {1, padded.seqlen, 4, 4});
      longer.fill(0.0);
      tensor->for_each(
          [&](auto i, auto p, auto h, auto c) { longer.set(i, p, h, c, tensor->at(i, p, h, c)); });
      *tensor = longer;
    }
    const Results got = run(phantom, inputs);
    const Results expected = run(padded, zeros);
    EXPECT_EQ(difference(got.out, expected.out.slice(0, n), tolerance()), "");
    EXPECT_EQ(difference(got.dquery, expected.dquery.slice(0, n), tolerance()), "");
    EXPECT_EQ(difference(got.dkey, expected.dkey.slice(0, n), tolerance()), "");
    EXPECT_EQ(difference(got.dvalue, expected.dvalue.slice(0, n), tolerance()), "");
  }
}

/// Rows whose key set lacks j, by the pattern.
bool sees(const std::vector<std::int32_t>& pattern, std::int64_t n, std::int64_t p,
          std::int64_t j) {
  return pattern[static_cast<std::size_t>(p * n + j)] > 0;
}

TEST_P(Metamorphic, M6PerturbingATokenLeavesRowsThatDoNotSeeIt) {  // X1, X6
  constexpr std::int64_t kLength = 150;
  for (const bool is_causal : {true, false}) {
    Problem base = problem(kLength, 3, 8, {{16, 1}, {150, 3}, {70, 2}});
    base.is_causal = is_causal;
    const Inputs inputs = make_inputs(base, {.amplitude = 1.0});
    const Results before = run(base, inputs);
    for (const std::int64_t j : {0, 17, 69, 70, 131, 149}) {
      Inputs changed = inputs;
      for (std::int64_t h = 0; h < 3; ++h) {
        for (std::int64_t c = 0; c < 8; ++c) {
          changed.key.set(0, j, h, c, 7.5);
          changed.value.set(0, j, h, c, -9.25);
        }
      }
      const Results after = run(base, changed);
      for (std::int64_t h = 0; h < 3; ++h) {
        const std::vector<std::int32_t> pattern = attention_pattern(base, h);
        bool some_row_changed = false;
        for (std::int64_t p = 0; p < kLength; ++p) {
          for (std::int64_t c = 0; c < 8; ++c) {
            const bool same = before.out.at(0, p, h, c) == after.out.at(0, p, h, c);
            ASSERT_TRUE(same || sees(pattern, kLength, p, j))
                << "row " << p << " changed by token " << j;
            ASSERT_TRUE(same || !is_causal || p >= j);
            some_row_changed = some_row_changed || !same;
          }
        }
        EXPECT_TRUE(some_row_changed) << j;
      }
    }
  }
}

TEST_P(Metamorphic, M6GradientsReachOnlyKeysThatAreSeen) {  // X6 on gradients
  constexpr std::int64_t kLength = 90;
  Problem causal = problem(kLength, 3, 8, {{16, 1}, {90, 3}});
  causal.is_causal = true;
  Inputs inputs = make_inputs(causal, {.amplitude = 1.0});
  for (const std::int64_t p : {0, 15, 16, 44, 89}) {
    inputs.dout.fill(0.0);
    for (std::int64_t h = 0; h < 3; ++h) {
      inputs.dout.set(0, p, h, 0, 1.0);
    }
    const Results got = run(causal, inputs);
    for (std::int64_t h = 0; h < 3; ++h) {
      const std::vector<std::int32_t> pattern = attention_pattern(causal, h);
      for (std::int64_t j = 0; j < kLength; ++j) {
        const bool seen = sees(pattern, kLength, p, j);
        ASSERT_EQ(got.dvalue.at(0, j, h, 0) != 0.0, seen) << p << " " << j;
        ASSERT_TRUE(seen || got.dkey.at(0, j, h, 3) == 0.0) << p << " " << j;
      }
    }
  }
}

TEST_P(Metamorphic, M7GroupedQueriesEqualRepeatedKeys) {
  Problem grouped = problem(33, 6, 4, {{10, 1}, {33, 4}});
  grouped.num_kv_heads = 2;
  Problem repeated = grouped;
  repeated.num_kv_heads = 6;
  const Inputs inputs = make_inputs(grouped, {.amplitude = 1.0});
  Inputs copies = inputs;
  for (Tensor* tensor : {&copies.key, &copies.value}) {
    Tensor wide(tensor->dtype(), {1, 33, 6, 4});
    wide.for_each(
        [&](auto i, auto p, auto h, auto c) { wide.set(i, p, h, c, tensor->at(i, p, h / 3, c)); });
    *tensor = wide;
  }
  const Results got = run(grouped, inputs);
  const Results expected = run(repeated, copies);
  EXPECT_EQ(difference(got.out, expected.out, tolerance()), "");
  EXPECT_EQ(difference(got.lse, expected.lse, tolerance()), "");
  EXPECT_EQ(difference(got.dquery, expected.dquery, tolerance()), "");
  for (Tensor Results::* member : {&Results::dkey, &Results::dvalue}) {
    Tensor sums((got.*member).dtype(), (got.*member).shape());
    sums.for_each([&](auto i, auto p, auto h, auto c) {
      const Tensor& wide = expected.*member;
      sums.set(i, p, h, c,
               wide.at(i, p, 3 * h, c) + wide.at(i, p, 3 * h + 1, c) + wide.at(i, p, 3 * h + 2, c));
    });
    EXPECT_EQ(difference(got.*member, sums, tolerance()), "");
  }
}

TEST_P(Metamorphic, M8PackedEqualsALoopOverSequences) {
  for (const Tail tail : {Tail::kMask, Tail::kPhantom}) {
    Problem packed = problem(40, 3, 4, {{5, 1}, {16, 3}});
    packed.cu_seqlens = {0, 0, 11, 12, 12, 40};
    packed.tail = tail;
    packed.lse_grad = false;
    const Inputs inputs = make_inputs(packed, {.amplitude = 1.0});
    const Results got = run(packed, inputs);
    for (std::size_t s = 1; s < packed.cu_seqlens.size(); ++s) {
      const std::int64_t begin = packed.cu_seqlens[s - 1];
      const std::int64_t end = packed.cu_seqlens[s];
      Problem one = packed;
      one.cu_seqlens.clear();
      one.seqlen = end - begin;
      Inputs rows = inputs;
      for (Tensor* tensor : {&rows.query, &rows.key, &rows.value, &rows.dout}) {
        *tensor = tensor->slice(begin, end);
      }
      const Results expected = run(one, rows);
      EXPECT_EQ(difference(got.out.slice(begin, end), expected.out, tolerance()), "");
      EXPECT_EQ(difference(got.dquery.slice(begin, end), expected.dquery, tolerance()), "");
      EXPECT_EQ(difference(got.dkey.slice(begin, end), expected.dkey, tolerance()), "");
      EXPECT_EQ(difference(got.dvalue.slice(begin, end), expected.dvalue, tolerance()), "");
    }
  }
}

TEST_P(Metamorphic, M9MaskedKeysDoNotActWhateverTheyHold) {  // R10, T2, X4
  for (const bool is_causal : {false, true}) {
    Problem masked = problem(75, 2, 6, {{20, 1}, {75, 2}});
    masked.is_causal = is_causal;
    masked.has_key_mask = true;
    const Inputs inputs = make_inputs(masked, {.amplitude = 1.0});
    const Results expected = run(masked, inputs);
    EXPECT_EQ(
        difference(expected, testing::materialised(masked, inputs, DType::kFloat64), tolerance()),
        "");
    for (const double poison : {std::numeric_limits<double>::quiet_NaN(), kInfinity, 3.0}) {
      Inputs poisoned = inputs;
      for (std::int64_t j = 0; j < 75; ++j) {
        for (std::int64_t h = 0; inputs.key_mask[static_cast<std::size_t>(j)] == 0 && h < 2; ++h) {
          for (std::int64_t c = 0; c < 6; ++c) {
            poisoned.key.set(0, j, h, c, poison);
            poisoned.value.set(0, j, h, c, poison);
          }
        }
      }
      EXPECT_EQ(bit_difference(run(masked, poisoned), expected), "") << poison;
    }
  }
}

TEST_P(Metamorphic, M9EverythingMaskedGivesZeros) {  // T2
  for (const Merge merge : {Merge::kLse, Merge::kSum, Merge::kMean}) {
    Problem masked = problem(30, 2, 6, {{8, 1}, {30, 2}});
    masked.has_key_mask = true;
    masked.merge = merge;
    Inputs inputs = make_inputs(masked, {.with_dlse = true});
    inputs.key_mask.assign(inputs.key_mask.size(), 0);
    const Results got = run(masked, inputs);
    got.lse.for_each(
        [&](auto i, auto h, auto p, auto) { ASSERT_EQ(got.lse.at(i, h, p), -kInfinity); });
    for (const Tensor* tensor : {&got.out, &got.dquery, &got.dkey, &got.dvalue}) {
      tensor->for_each(
          [&](auto i, auto p, auto h, auto c) { ASSERT_EQ(tensor->at(i, p, h, c), 0.0); });
    }
  }
}

/// Rows [first, first + count) of batch element `batch`.
Tensor rows_of(const Tensor& tensor, std::int64_t batch, std::int64_t first, std::int64_t count) {
  Tensor part(tensor.dtype(), {1, count, tensor.shape()[2], tensor.shape()[3]});
  part.for_each([&](auto, auto j, auto h, auto c) {
    part.set(0, j, h, c, tensor.at(batch, first + j, h, c));
  });
  return part;
}

TEST_P(Metamorphic, SequsedIsTheLengthOfTheSequence) {  // batched = alone, bit for bit
  for (const Tail tail : {Tail::kMask, Tail::kPhantom}) {
    for (const Merge merge : {Merge::kLse, Merge::kSum, Merge::kMean}) {
      Problem batched = problem(150, 2, 6, {{16, 1}, {50, 3}, {200, 2}});
      batched.batch = 5;
      batched.has_seqused = true;
      batched.tail = tail;
      batched.merge = merge;
      Inputs inputs = make_inputs(batched, {.amplitude = 1.0});
      inputs.seqused = {0, 33, 150, 1, 101};
      for (std::int64_t b = 0; b < batched.batch; ++b) {
        // Beyond its length a sequence does not exist: NaN there reaches nobody.
        for (Tensor* tensor : {&inputs.query, &inputs.key, &inputs.value, &inputs.dout}) {
          for (std::int64_t p = inputs.seqused[static_cast<std::size_t>(b)]; p < 150; ++p) {
            tensor->set(b, p, b % 2, 3, std::numeric_limits<double>::quiet_NaN());
          }
        }
      }
      const Results got = run(batched, inputs);
      for (std::int64_t b = 0; b < batched.batch; ++b) {
        const std::int64_t n = inputs.seqused[static_cast<std::size_t>(b)];
        Problem alone = batched;
        alone.batch = 1;
        alone.seqlen = n;
        alone.has_seqused = false;
        Inputs part = inputs;
        for (Tensor Inputs::* tensor :
             {&Inputs::query, &Inputs::key, &Inputs::value, &Inputs::dout}) {
          part.*tensor = rows_of(inputs.*tensor, b, 0, n);
        }
        const Results expected = run(alone, part);
        for (Tensor Results::* tensor :
             {&Results::out, &Results::dquery, &Results::dkey, &Results::dvalue}) {
          EXPECT_EQ(bit_difference(rows_of(got.*tensor, b, 0, n), expected.*tensor), "") << n;
          const Tensor rest = rows_of(got.*tensor, b, n, 150 - n);
          rest.for_each([&](auto, auto j, auto h, auto c) { ASSERT_EQ(rest.at(0, j, h, c), 0.0); });
        }
        for (std::int64_t h = 0; h < 2; ++h) {
          for (std::int64_t p = 0; p < 150; ++p) {
            ASSERT_EQ(got.lse.at(b, h, p), p < n ? expected.lse.at(0, h, p) : -kInfinity);
          }
        }
      }
    }
  }
}

TEST_P(Metamorphic, M14LargeLogitsDoNotOverflow) {  // R22
  for (const double amplitude : {50.0, 150.0}) {
    Problem large = problem(70, 2, 8, {{20, 1}, {70, 2}});
    large.scale = 1.0;
    Inputs inputs = make_inputs(large, {.amplitude = amplitude});
    double largest = 0.0;
    const Results got = run(large, inputs);
    const Results expected = testing::reference(large, inputs);
    got.lse.for_each([&](auto i, auto h, auto p, auto c) {
      const double exact = expected.lse.at(i, h, p, c);
      largest = std::max(largest, std::abs(exact));
      ASSERT_NEAR(got.lse.at(i, h, p, c), exact, tolerance() * std::max(1.0, std::abs(exact)));
    });
    if (amplitude > 100.0) {
      EXPECT_GT(largest, 1e4);
    }
    for (const Tensor* tensor : {&got.out, &got.dquery, &got.dkey, &got.dvalue}) {
      tensor->for_each([&](auto i, auto p, auto h, auto c) {
        ASSERT_TRUE(std::isfinite(tensor->at(i, p, h, c)));
      });
    }
    // An error of the scores of |s| 2^-23 moves probabilities by that much: 2e-3 at 1e4.
    EXPECT_LE(max_error(got.out, expected.out),
              GetParam().dtype == DType::kFloat64 ? 1e-9 : 1e-2 * amplitude);
  }
}

TEST_P(Metamorphic, M14ALogSumExpOfZeroIsAValue) {  // T4: one key with score 0 in both branches
  Problem causal = problem(6, 1, 3, {{6, 1}, {6, 2}});
  causal.is_causal = true;
  Inputs inputs = make_inputs(causal);
  for (std::int64_t c = 0; c < 3; ++c) {
    inputs.query.set(0, 0, 0, c, 0.0);
  }
  Results got = run(causal, inputs);
  EXPECT_NEAR(got.lse.at(0, 0, 0), std::log(2.0), 1e-6);
  EXPECT_NEAR(got.out.at(0, 0, 0, 1), inputs.value.at(0, 0, 0, 1), 1e-6);
  causal.branches.pop_back();
  got = run(causal, inputs);
  EXPECT_EQ(got.lse.at(0, 0, 0), 0.0);
  EXPECT_EQ(got.out.at(0, 0, 0, 1), inputs.value.at(0, 0, 0, 1));
  EXPECT_EQ(difference(got, testing::materialised(causal, inputs, DType::kFloat64), tolerance()),
            "");
}

TEST_P(Metamorphic, M15DetachedWeightsChangeOnlyQueriesAndKeys) {
  Problem exact = problem(45, 4, 6, {{8, 1}, {16, 2}, {45, 4}});
  Problem detached = exact;
  detached.lse_grad = false;
  const Inputs inputs = make_inputs(exact);
  const Results a = run(exact, inputs);
  const Results b = run(detached, inputs);
  EXPECT_EQ(difference(a.out, b.out, tolerance()), "");
  EXPECT_EQ(difference(a.dvalue, b.dvalue, tolerance()), "");
  EXPECT_GT(max_error(a.dquery, b.dquery), 1e-2);
  EXPECT_GT(max_error(a.dkey, b.dkey), 1e-2);
}

TEST_P(Metamorphic, ConstantValuesComeOutAsOutScale) {  // X7: V = 1
  for (const Tail tail : {Tail::kMask, Tail::kPhantom}) {
    Problem ones = problem(37, 4, 5, {{8, 1}, {32, 4}});
    ones.tail = tail;
    ones.out_scale = 0.75;
    Inputs inputs = make_inputs(ones);
    inputs.value.fill(1.0);
    const Results got = run(ones, inputs);
    bool some_row_is_smaller = false;
    got.out.for_each([&](auto i, auto p, auto h, auto c) {
      const double out = got.out.at(i, p, h, c);
      ASSERT_LE(out, 0.75 + 1e-6);
      if (tail == Tail::kMask) {
        ASSERT_NEAR(out, 0.75, 1e-6);
      }
      some_row_is_smaller = some_row_is_smaller || out < 0.74;
    });
    EXPECT_EQ(some_row_is_smaller, tail == Tail::kPhantom);
  }
}

TEST_P(Metamorphic, LinearInValues) {
  const Problem base = problem(37, 2, 5, {{8, 1}, {32, 2}});
  Inputs inputs = make_inputs(base, {.amplitude = 1.0});
  const Inputs other = make_inputs(base, {.amplitude = 1.0, .first_seed = 20});
  const Results first = run(base, inputs);
  Inputs second = inputs;
  second.value = other.value;
  const Results b = run(base, second);
  inputs.value.for_each([&](auto i, auto p, auto h, auto c) {
    inputs.value.set(i, p, h, c,
                     2.0 * inputs.value.at(i, p, h, c) - 0.5 * other.value.at(i, p, h, c));
  });
  const Results got = run(base, inputs);
  Tensor expected(DType::kFloat64, got.out.shape());
  expected.for_each([&](auto i, auto p, auto h, auto c) {
    expected.set(i, p, h, c, 2.0 * first.out.at(i, p, h, c) - 0.5 * b.out.at(i, p, h, c));
  });
  EXPECT_EQ(difference(got.out, expected, tolerance()), "");
}

}  // namespace
}  // namespace dilated
