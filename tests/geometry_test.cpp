// Index sets by brute force (semantics §3 and §11): every n <= 40, w <= 12, r <= 7, every residue.
// The expected sets are literal loops over positions, as in the oracle's `branch_row`.
#include "src/geometry.h"

#include <algorithm>
#include <numeric>
#include <optional>
#include <set>

#include <gtest/gtest.h>

#include "dilated/plan.h"
#include "dilated/problem.h"

#include "tests/support/call.h"

namespace dilated {
namespace {

static_assert(BranchGeometry(10, 4, 3).rows(0, 0) == 2);
static_assert(BranchGeometry(10, 4, 3).rows(2, 2) == 0);
static_assert(ceil_div(7, 3) == 3 && ceil_div(0, 3) == 0);

struct Row {
  std::vector<std::int64_t> keys;
  std::int64_t phantoms = 0;
};

/// What query p sees in one branch, position by position.
std::optional<Row> literal_row(std::int64_t n, std::int64_t w, std::int64_t r, std::int64_t o,
                               std::int64_t p) {
  const std::int64_t w_e = w < n ? w : n;
  std::int64_t base = 0;
  while (base + w_e <= p) {
    base += w_e;
  }
  if (o < 0 || (p - base) % r != o) {
    return std::nullopt;
  }
  Row row;
  for (std::int64_t j = base; j < base + w_e && j < n; ++j) {
    if ((j - base) % r == o) {
      row.keys.push_back(j);
    }
  }
  for (std::int64_t t = 0; t < w_e; t += r) {  // a padded segment holds ceil(w_e / r) slots
    ++row.phantoms;
  }
  row.phantoms -= static_cast<std::int64_t>(row.keys.size());
  return row;
}

template <typename Body>
void for_every_small_branch(const Body& body) {
  for (std::int64_t n = 1; n <= 40; ++n) {
    for (std::int64_t w = 1; w <= 12; ++w) {
      for (std::int64_t r = 1; r <= 7; ++r) {
        for (std::int64_t o = -1; o < r; ++o) {
          body(n, w, r, o);
        }
      }
    }
  }
}

/// Keys of p in ascending order, as the kernels enumerate them; nothing if p is not covered.
std::optional<Row> row_of(const BranchGeometry& geometry, std::int64_t o, std::int64_t p) {
  if (!geometry.covers(p, o)) {
    return std::nullopt;
  }
  Row row;
  const std::int64_t s = p / geometry.segment;
  for (std::int64_t i = 0; i < geometry.rows(s, o); ++i) {
    row.keys.push_back(geometry.position(s, o, i));
  }
  row.phantoms = geometry.phantoms(s, o, {0, geometry.length});
  return row;
}

TEST(Geometry, KeySetsEqualTheDefinition) {  // T5, T9
  for_every_small_branch([](auto n, auto w, auto r, auto o) {
    const BranchGeometry geometry(n, w, r);
    for (std::int64_t p = 0; p < n; ++p) {
      const auto expected = literal_row(n, w, r, o, p);
      const auto got = row_of(geometry, o, p);
      ASSERT_EQ(got.has_value(), expected.has_value())
          << n << " " << w << " " << r << " " << o << " " << p;
      if (expected) {
        ASSERT_EQ(got->keys, expected->keys) << n << " " << w << " " << r << " " << o << " " << p;
        ASSERT_EQ(got->phantoms, expected->phantoms)
            << n << " " << w << " " << r << " " << o << " " << p;  // T1
        ASSERT_EQ(got->keys[static_cast<std::size_t>(geometry.row_of(p))], p);
      }
    }
  });
}

TEST(Geometry, EveryPositionIsSelectedExactlyWhenItsResidueMatches) {
  for_every_small_branch([](auto n, auto w, auto r, auto o) {
    if (o < 0) {
      return;
    }
    const BranchGeometry geometry(n, w, r);
    std::multiset<std::int64_t> selected;
    for (std::int64_t s = 0; s < geometry.num_segments(); ++s) {
      for (std::int64_t i = 0; i < geometry.rows(s, o); ++i) {
        selected.insert(geometry.position(s, o, i));
      }
    }
    for (std::int64_t p = 0; p < n; ++p) {
      ASSERT_EQ(selected.count(p), literal_row(n, w, r, o, p) ? 1u : 0u);
    }
  });
}

TEST(Geometry, FirstRowAtIsTheFirstPositionNotBefore) {
  for_every_small_branch([](auto n, auto w, auto r, auto o) {
    const BranchGeometry geometry(n, w, r);
    for (std::int64_t s = 0; o >= 0 && s < geometry.num_segments(); ++s) {
      for (std::int64_t p = 0; p <= n; ++p) {
        std::int64_t expected = 0;
        while (expected < geometry.rows(s, o) && geometry.position(s, o, expected) < p) {
          ++expected;
        }
        ASSERT_EQ(geometry.first_row_at(s, o, p), expected);
      }
    }
  });
}

TEST(Geometry, CompactRowsAreDistinctAndBounded) {
  for_every_small_branch([](auto n, auto w, auto r, auto o) {
    const BranchGeometry geometry(n, w, r);
    ASSERT_LE(geometry.compact_rows({0, n}), std::min(n, n / r + n / w + 2))
        << n << " " << w << " " << r;
    std::set<std::int64_t> rows;
    for (std::int64_t p = 0; p < n; ++p) {
      if (geometry.covers(p, o)) {
        const std::int64_t row = geometry.slot(p / geometry.segment, geometry.row_of(p));
        ASSERT_TRUE(rows.insert(row).second);
        ASSERT_LT(row, geometry.compact_rows({0, n}));
      }
    }
  });
}

TEST(Geometry, BranchRowsOfAPlanHoldEverySequence) {
  Problem problem =
      testing::paper_problem(40, 3, 4, {{3, 1}, {7, 2}, {12, 5}, {std::int64_t{1} << 40, 7}});
  problem.merge = Merge::kSum;
  for (const std::vector<std::int64_t>& cu : {std::vector<std::int64_t>{},
                                              {0, 40},
                                              {0, 0, 1, 7, 7, 20, 40, 40},
                                              {0, 1, 2, 3, 4, 5, 6, 7, 8, 40}}) {
    problem.cu_seqlens = cu;
    const Plan plan = make_plan(problem, "reference");
    ASSERT_TRUE(plan.needs_branch_outputs());
    std::set<std::int64_t> rows;
    for (std::size_t b = 0; b < problem.branches.size(); ++b) {
      for (std::size_t s = 0; s < plan.sequences().size(); ++s) {
        const std::int64_t n = plan.sequences()[s].length;
        if (n == 0) {
          continue;
        }
        const BranchGeometry geometry(n, problem.branches[b].segment, problem.branches[b].dilation);
        for (std::int64_t row = 0; row < geometry.compact_rows({0, n}); ++row) {
          const std::int64_t at = plan.branch_row_begin(b, s) + row;
          EXPECT_TRUE(rows.insert(at).second) << "two branches share row " << at;
          EXPECT_LT(at, plan.branch_rows());
        }
      }
    }
    std::int64_t formula = 0;
    const auto sequences = static_cast<std::int64_t>(cu.empty() ? 1 : cu.size() - 1);
    for (const Branch& branch : problem.branches) {
      formula +=
          std::min<std::int64_t>(40, 40 / branch.dilation + 40 / branch.segment + sequences + 1);
    }
    EXPECT_EQ(plan.branch_rows(), formula);
  }
}

TEST(Geometry, PatternAndPairCountsEqualTheDefinition) {  // X8: pure functions of the problem
  for (const bool is_causal : {false, true}) {
    for (std::int64_t n = 0; n <= 30; n += 3) {
      Problem problem = testing::paper_problem(n, 4, 8, {{4, 1}, {5, 3}, {12, 7}, {100, 2}});
      problem.branches[1].offsets = {2, -1, 0, 2};
      problem.is_causal = is_causal;
      problem.batch = 2;
      std::vector<std::int64_t> pairs(problem.branches.size(), 0);
      for (std::int64_t h = 0; h < 4; ++h) {
        std::vector<std::int32_t> expected(static_cast<std::size_t>(n * n), 0);
        for (std::size_t b = 0; b < problem.branches.size(); ++b) {
          const Branch& branch = problem.branches[b];
          for (std::int64_t p = 0; p < n; ++p) {
            const auto row = literal_row(n, branch.segment, branch.dilation,
                                         branch.offsets[static_cast<std::size_t>(h)], p);
            for (const std::int64_t j : row ? row->keys : std::vector<std::int64_t>{}) {
              if (!is_causal || j <= p) {
                ++expected[static_cast<std::size_t>(p * n + j)];
                pairs[b] += 2;  // batch elements
              }
            }
          }
        }
        EXPECT_EQ(attention_pattern(problem, h), expected);
        EXPECT_EQ(attention_pattern(problem, h), attention_pattern(problem, h));
      }
      EXPECT_EQ(count_pairs(problem), pairs);
    }
  }
}

TEST(Geometry,
     PairCountsOfPublishedConfigurations) {  // semantics §10, exact pairs per token and head
  const auto per_token = [](const Problem& problem) {
    const std::vector<std::int64_t> pairs = count_pairs(problem);
    return static_cast<double>(std::accumulate(pairs.begin(), pairs.end(), std::int64_t{0})) /
           static_cast<double>(problem.seqlen * problem.num_heads);
  };
  Problem paper = testing::paper_problem(
      32768, 12, 64, {{2048, 1}, {4096, 2}, {8192, 4}, {16384, 6}, {32768, 12}});
  EXPECT_NEAR(per_token(paper), 4266.7, 0.05);
  paper.is_causal = true;
  EXPECT_NEAR(per_token(paper), 2134.3, 0.05);
  Problem pair = testing::paper_problem(4096, 12, 64, {{2048, 1}, {4096, 2}});
  EXPECT_DOUBLE_EQ(per_token(pair), 3072.0);
}

TEST(Geometry, PackedPairCountsAreSumsOverSequences) {
  Problem packed = testing::paper_problem(20, 3, 8, {{4, 1}, {9, 2}});
  packed.cu_seqlens = {0, 7, 7, 8, 20};
  std::vector<std::int64_t> expected(2, 0);
  for (const std::int64_t n : {7, 0, 1, 12}) {
    const std::vector<std::int64_t> one =
        count_pairs(testing::paper_problem(n, 3, 8, {{4, 1}, {9, 2}}));
    expected[0] += one[0];
    expected[1] += one[1];
  }
  EXPECT_EQ(count_pairs(packed), expected);
}

}  // namespace
}  // namespace dilated
