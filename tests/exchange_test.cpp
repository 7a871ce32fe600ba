// Exchange plans (row sets against the definition) and class rows: shards that are computed one by
// one from what the plan sends have the bits of the whole. M11.
#include <algorithm>
#include <numeric>
#include <set>
#include <tuple>

#include <gtest/gtest.h>
#include <rapidcheck.h>

#include "dilated/error.h"
#include "dilated/exchange_plan.h"

#include "src/geometry.h"
#include "src/sequences.h"
#include "tests/support/materialised.h"
#include "tests/support/random_problem.h"

namespace dilated::testing {
namespace {

std::vector<std::int64_t> draw_shards(std::int64_t seqlen) {
  std::vector<std::int64_t> cuts = {0, seqlen};
  for (int i = *rc::gen::inRange(0, 5); i > 0; --i) {
    cuts.push_back(*rc::gen::inRange<std::int64_t>(0, seqlen + 1));
  }
  std::sort(cuts.begin(), cuts.end());
  std::vector<std::int64_t> shards;
  for (std::size_t i = 1; i < cuts.size(); ++i) {
    shards.push_back(cuts[i] - cuts[i - 1]);
  }
  return shards;
}

Problem without_mask(Problem problem) {
  problem.has_key_mask = false;
  return problem;
}

/// (branch, key/value head, row of the whole call).
using KeyOfBranch = std::tuple<std::size_t, std::int64_t, std::int64_t>;

/// Keys that the queries in `rows` of one batch element see, by definition.
std::set<KeyOfBranch> keys_seen(const Problem& problem, Range rows) {
  std::set<KeyOfBranch> seen;
  Problem single = problem;
  single.batch = std::min<std::int64_t>(problem.batch, 1);
  for (const Sequence& sequence : sequences_of(single)) {
    for (std::size_t b = 0; b < problem.branches.size(); ++b) {
      const Branch& branch = problem.branches[b];
      for (std::int64_t h = 0; h < problem.num_heads; ++h) {
        const std::int64_t o = branch.offsets[static_cast<std::size_t>(h)];
        const std::int64_t w = std::min(branch.segment, sequence.length);
        for (std::int64_t p = 0; p < sequence.length; ++p) {
          if (o < 0 || !rows.contains(sequence.key_row + p) || (p % w) % branch.dilation != o) {
            continue;
          }
          for (std::int64_t j = p - p % w; j < std::min(p - p % w + w, sequence.length); ++j) {
            if ((j % w) % branch.dilation == o && (!problem.is_causal || j <= p)) {
              seen.insert({b, h / problem.heads_per_kv_head(), sequence.key_row + j});
            }
          }
        }
      }
    }
  }
  return seen;
}

std::string row_sets_differ(const Problem& problem, const std::vector<std::int64_t>& shards) {
  const ExchangePlan plan = make_exchange_plan(problem, shards);
  bool travels = false;
  for (std::int64_t to = 0; to < plan.num_ranks(); ++to) {
    const std::set<KeyOfBranch> seen = keys_seen(problem, plan.shard(to));
    std::set<KeyOfBranch> expected;
    for (const KeyOfBranch& key : seen) {
      if (!plan.shard(to).contains(std::get<2>(key))) {
        expected.insert(key);
      }
    }
    std::set<KeyOfBranch> got;
    std::set<std::int64_t> class_rows;
    std::vector<ClassRun> received = plan.receives(to);
    for (const ClassRun& run : received) {
      for (std::int64_t i = 0; i < run.count; ++i) {
        const std::int64_t row = plan.shard(run.from).begin + run.row + i * run.step;
        if (!plan.shard(run.from).contains(row)) {
          return "a run leaves the shard of its sender";
        }
        if (!class_rows.insert(run.class_row + i).second ||
            run.class_row + i >= plan.class_row_count(to)) {
          return "a class row is written twice or does not exist";
        }
        if (run.from != to) {
          got.insert({run.branch, run.kv_head, row});
        }
      }
    }
    if (got != expected) {
      return "rank " + std::to_string(to) + " receives other rows than its queries see";
    }
    travels = travels || !expected.empty();
    std::vector<ClassRun> sent;
    for (std::int64_t from = 0; from < plan.num_ranks(); ++from) {
      for (const ClassRun& run : plan.sends(from)) {
        if (run.to == to) {
          sent.push_back(run);
        }
      }
    }
    if (sent != received) {
      return "what is sent is not what is received";
    }
  }
  if (travels && plan.is_local()) {
    return "a plan calls itself local though rows travel";
  }
  return "";
}

TEST(ExchangePlan, RowSetsEqualTheDefinition) {
  check_property(
      "row sets", 1500, {.max_seqlen = 40, .max_head_dim = 1}, [](const RandomCase& drawn) {
        return row_sets_differ(without_mask(drawn.problem), draw_shards(drawn.problem.seqlen));
      });
}

/// Rows [shard) of dimension 2 of (batch, heads, rows, 1).
Tensor row_values(const Tensor& from, Range shard) {
  Tensor part(from.dtype(), {from.shape()[0], from.shape()[1], shard.size(), 1});
  part.for_each([&](auto b, auto h, auto p, auto c) {
    part.set(b, h, p, c, from.at(b, h, shard.begin + p, c));
  });
  return part;
}

/// Forward and backward of one rank, with the class rows that all ranks send.
Results run_rank(const ExchangePlan& plan, std::int64_t rank, const Problem& whole,
                 const Inputs& inputs, const RunOptions& options) {
  const Range shard = plan.shard(rank);
  Inputs local = inputs;
  for (Tensor Inputs::* tensor : {&Inputs::query, &Inputs::key, &Inputs::value, &Inputs::dout}) {
    local.*tensor = (inputs.*tensor).slice(shard.begin, shard.end);
  }
  if (inputs.dlse) {
    local.dlse = row_values(*inputs.dlse, shard);
  }
  // What no run writes stays NaN.
  local.class_key =
      Tensor(whole.dtype, {whole.batch, plan.class_row_count(rank), 1, whole.head_dim});
  local.class_value = local.class_key;
  for (const ClassRun& run : plan.receives(rank)) {
    const std::int64_t first = plan.shard(run.from).begin + run.row;
    for (std::int64_t i = 0; i < run.count; ++i) {
      for (std::int64_t b = 0; b < whole.batch; ++b) {
        for (std::int64_t c = 0; c < whole.head_dim; ++c) {
          const std::int64_t row = first + i * run.step;
          local.class_key.set(b, run.class_row + i, 0, c, inputs.key.at(b, row, run.kv_head, c));
          local.class_value.set(b, run.class_row + i, 0, c,
                                inputs.value.at(b, row, run.kv_head, c));
        }
      }
    }
  }
  return run(plan.local_problem(rank), local, options);
}

/// All ranks' results as the whole's; dkey and dvalue are summed in rank order.
Results run_ranks(const Problem& whole, const Inputs& inputs, const std::string& backend,
                  const std::vector<std::int64_t>& shards) {
  const ExchangePlan plan = make_exchange_plan(whole, shards);
  const DType sums = whole.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  const auto zeros = [](DType dtype, const Tensor::Shape& shape) {
    Tensor tensor(dtype, shape);
    tensor.fill(0.0);
    return tensor;
  };
  Results total{zeros(whole.dtype, inputs.query.shape()),
                zeros(sums, {whole.batch, whole.num_heads, whole.seqlen, 1}),
                zeros(whole.dtype, inputs.query.shape()), zeros(sums, inputs.key.shape()),
                zeros(sums, inputs.value.shape())};
  for (std::int64_t rank = 0; rank < plan.num_ranks(); ++rank) {
    const Range shard = plan.shard(rank);
    const Results rounded = run_rank(plan, rank, whole, inputs, {.backend = backend});
    rounded.out.for_each([&](auto b, auto p, auto h, auto c) {
      total.out.set(b, shard.begin + p, h, c, rounded.out.at(b, p, h, c));
      total.dquery.set(b, shard.begin + p, h, c, rounded.dquery.at(b, p, h, c));
    });
    rounded.lse.for_each([&](auto b, auto h, auto p, auto c) {
      total.lse.set(b, h, shard.begin + p, c, rounded.lse.at(b, h, p, c));
    });
    const Results got =
        run_rank(plan, rank, whole, inputs, {.backend = backend, .unrounded = true});
    const auto add = [](Tensor& to, std::int64_t b, std::int64_t row, std::int64_t h,
                        std::int64_t c,
                        double value) { to.set(b, row, h, c, to.at(b, row, h, c) + value); };
    got.dkey.for_each([&](auto b, auto p, auto h, auto c) {
      add(total.dkey, b, shard.begin + p, h, c, got.dkey.at(b, p, h, c));
      add(total.dvalue, b, shard.begin + p, h, c, got.dvalue.at(b, p, h, c));
    });
    for (const ClassRun& run : plan.receives(rank)) {
      for (std::int64_t i = 0; i < run.count; ++i) {
        const std::int64_t row = plan.shard(run.from).begin + run.row + i * run.step;
        for (std::int64_t b = 0; b < whole.batch; ++b) {
          for (std::int64_t c = 0; c < whole.head_dim; ++c) {
            add(total.dkey, b, row, run.kv_head, c, got.dclass_key.at(b, run.class_row + i, 0, c));
            add(total.dvalue, b, row, run.kv_head, c,
                got.dclass_value.at(b, run.class_row + i, 0, c));
          }
        }
      }
    }
  }
  total.dkey = total.dkey.converted(whole.dtype);
  total.dvalue = total.dvalue.converted(whole.dtype);
  return total;
}

std::string ranks_differ(const RandomCase& drawn, const std::string& backend) {
  const Problem whole = without_mask(drawn.problem);
  const Results got = run_ranks(whole, drawn.inputs, backend, draw_shards(whole.seqlen));
  const Results expected = run(whole, drawn.inputs, {.backend = backend});
  for (const NamedResult& result : {kResults[0], kResults[1], kResults[2]}) {
    const std::string text = bit_difference(
        got.*result.member, (expected.*result.member).converted((got.*result.member).dtype()));
    if (!text.empty()) {
      return std::string(result.name) + text;
    }
  }
  if (whole.dtype == DType::kFloat64) {
    return difference(got, expected, 1e-10);
  }
  constexpr int kDraws = 32;
  return rule_violation(whole, drawn.inputs, got, kDraws);
}

TEST(ClassRows, RanksHaveTheBitsOfTheWhole) {
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    check_property("ranks, cpu", 150, {.dtype = dtype},
                   [](const RandomCase& drawn) { return ranks_differ(drawn, "cpu"); });
    check_property("ranks, cpu, longer", 30,
                   {.dtype = dtype, .max_seqlen = 400, .max_head_dim = 70},
                   [](const RandomCase& drawn) { return ranks_differ(drawn, "cpu"); });
  }
  check_property("ranks, reference", 100, {.dtype = DType::kFloat64, .max_seqlen = 40},
                 [](const RandomCase& drawn) { return ranks_differ(drawn, "reference"); });
}

/// Uniform residues of 12 heads, P ranks of C rows: every rank receives from every rank of its
/// segment all rows of every class, 2 m Hk d (1 - 1/g) elements per branch.
TEST(ExchangePlan, VolumesEqualTheFormula) {
  const std::int64_t ranks = 1024;
  const std::int64_t length = std::int64_t{1} << 30;
  const std::int64_t shard = length / ranks;
  const std::int64_t heads = 12;
  const std::int64_t rows = 2048;  // of a segment and class
  Problem problem = paper_problem(
      length, heads, 64, {{2048, 1}, {32 * shard, 32 * shard / rows}, {length, length / rows}});
  problem.dtype = DType::kBFloat16;
  const ExchangePlan plan = make_exchange_plan(problem, std::vector<std::int64_t>(ranks, shard));
  const std::int64_t whole = 2 * rows * heads * 64 * 2;
  EXPECT_EQ(plan.received_bytes(500), whole * 31 / 32 + whole * 1023 / 1024);
  EXPECT_EQ(plan.class_row_count(500), 2 * rows * heads);
  EXPECT_FALSE(plan.is_local());
  problem.branches.resize(1);
  EXPECT_TRUE(make_exchange_plan(problem, std::vector<std::int64_t>(ranks, shard)).is_local());
}

TEST(ExchangePlan, RowSetsOfManyRanksEqualTheDefinition) {
  Problem problem = paper_problem(1500, 3, 1, {{7, 1}, {200, 3}, {1500, 11}});
  std::vector<std::int64_t> shards(1024, 1);  // fewer rows per rank than a dilation, uneven, empty
  std::fill_n(shards.begin() + 100, 238, 3);
  std::fill_n(shards.begin() + 700, 4, 0);
  shards.back() += 1500 - std::accumulate(shards.begin(), shards.end(), std::int64_t{0});
  for (const bool is_causal : {false, true}) {
    problem.is_causal = is_causal;
    const ExchangePlan plan = make_exchange_plan(problem, shards);
    for (const std::int64_t to : {0, 99, 100, 333, 702, 1022, 1023}) {
      std::set<KeyOfBranch> expected;
      for (const KeyOfBranch& key : keys_seen(problem, plan.shard(to))) {
        if (!plan.shard(to).contains(std::get<2>(key))) {
          expected.insert(key);
        }
      }
      std::set<KeyOfBranch> got;
      for (const ClassRun& run : plan.receives(to)) {
        for (std::int64_t i = 0; i < run.count && run.from != to; ++i) {
          got.insert(
              {run.branch, run.kv_head, plan.shard(run.from).begin + run.row + i * run.step});
        }
      }
      EXPECT_EQ(got, expected) << to;
    }
  }
}

TEST(ExchangePlan, HashesTellWhatDiffers) {
  const Problem problem = paper_problem(100, 4, 8, {{10, 1}, {100, 3}});
  const auto hash = [](const Problem& p, const std::vector<std::int64_t>& shards) {
    return make_exchange_plan(p, shards).hash();
  };
  const auto base = hash(problem, {50, 50});
  const auto expect_only = [&](std::size_t lane, const std::array<std::uint64_t, 4>& other) {
    for (std::size_t i = 0; i < 4; ++i) {
      EXPECT_EQ(base[i] == other[i], i != lane) << lane << " " << i;
    }
  };
  Problem other = problem;
  other.dtype = DType::kBFloat16;
  expect_only(0, hash(other, {50, 50}));
  other = problem;
  other.branches[1].offsets[2] = 1;
  expect_only(1, hash(other, {50, 50}));
  other = problem;
  other.is_causal = true;
  expect_only(2, hash(other, {50, 50}));
  expect_only(3, hash(problem, {51, 49}));
  other = problem;
  other.device.units = 7;  // ranks may have other numbers of threads
  EXPECT_EQ(base, hash(other, {50, 50}));
}

TEST(ExchangePlan, PrintsWhatEveryRankReceives) {
  const Problem problem = paper_problem(16, 2, 8, {{4, 1}, {16, 2}});
  EXPECT_EQ(make_exchange_plan(problem, {8, 8}).to_string(),
            "ranks         2\n"
            "rows travel   to the next rank: segments cross one border\n"
            "rank 0        rows [0, 8), receives [0, 8] key rows of the branches, 512 bytes\n"
            "rank 1        rows [8, 16), receives [0, 8] key rows of the branches, 512 bytes\n");
}

TEST(ExchangePlan, KnowsHowFarRowsTravel) {
  const Problem problem = paper_problem(48, 2, 8, {{4, 1}, {12, 2}});
  EXPECT_EQ(make_exchange_plan(problem, {12, 24, 12}).reach(), Reach::kLocal);
  EXPECT_EQ(make_exchange_plan(problem, {16, 16, 16}).reach(), Reach::kNeighbours);
  EXPECT_EQ(make_exchange_plan(problem, {16, 4, 4, 24}).reach(), Reach::kFar);
}

TEST(ExchangePlan, RejectsShardsThatDoNotCoverTheSequence) {
  const Problem problem = paper_problem(16, 2, 8, {{4, 1}});
  const auto message = [&](const std::vector<std::int64_t>& shards) {
    try {
      make_exchange_plan(problem, shards);
    } catch (const InvalidProblem& error) {
      return std::string(error.what());
    }
    return std::string("nothing");
  };
  EXPECT_EQ(message({8, 9}),
            "dilated_attention: shards[1]: expected 0 <= rows <= 8, what is left of seqlen = 16, "
            "got 9 (shards follow one another and cover the sequence)");
  EXPECT_EQ(message({8, 7}),
            "dilated_attention: shards: expected 16 rows together, seqlen, got 15 (shards follow "
            "one another and cover the sequence)");
  EXPECT_EQ(message({}),
            "dilated_attention: shards: expected one number of rows per rank, got none");
}

}  // namespace
}  // namespace dilated::testing
