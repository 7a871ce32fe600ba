// Offset builders against their formulas, presets against the table of semantics §7, overrides.
#include "dilated/options.h"

#include <set>

#include <gtest/gtest.h>

#include "dilated/error.h"

namespace dilated {
namespace {

std::vector<std::int64_t> ones(std::size_t count) { return std::vector<std::int64_t>(count, 1); }

Options with_dilations(const std::vector<std::int64_t>& dilations) {
  Options options;
  options.segments = ones(dilations.size());
  options.dilations = dilations;
  return options;
}

/// The oracle's `head_offset`: rule, branch, head, heads, r.
std::int64_t rule_of_the_oracle(const std::string& rule, std::int64_t b, std::int64_t h,
                                std::int64_t heads, std::int64_t r) {
  if (rule == "paper") {
    return h % r;
  }
  if (rule == "torchscale") {
    return h / ((heads + r - 1) / r);
  }
  return rule == "branch" ? b % r : 0;
}

/// fkodom_groups and cumulative_groups of the oracle.
std::vector<std::set<std::int64_t>> groups_of_the_oracle(const std::string& groups,
                                                         std::int64_t heads,
                                                         std::int64_t branches) {
  std::vector<std::set<std::int64_t>> result;
  std::int64_t start = 0;
  for (std::int64_t i = 0; i < branches; ++i) {
    const std::int64_t size = heads / branches + (i < heads % branches ? 1 : 0);
    std::set<std::int64_t> members;
    for (std::int64_t t = 0; t < size; ++t) {
      const std::int64_t h = (groups == "literal" ? i * size : start) + t;
      if (groups == "none" || h < heads) {
        members.insert(h);
      }
    }
    if (groups == "none") {
      for (std::int64_t h = 0; h < heads; ++h) {
        members.insert(h);
      }
    }
    start += size;
    result.push_back(members);
  }
  return result;
}

TEST(OffsetBuilders, EqualTheirFormulas) {  // T6, T7, X8
  const std::vector<std::int64_t> dilations = {1, 2, 3, 5, 8, 16, 6};
  for (const std::string rule : {"paper", "torchscale", "branch", "zero"}) {
    for (const std::string groups : {"none", "cumulative", "literal"}) {
      for (const std::string gqa : {"kv", "q"}) {
        for (std::int64_t kv_heads = 1; kv_heads <= 6; ++kv_heads) {
          for (std::int64_t per_kv = 1; per_kv <= 4; ++per_kv) {
            const std::int64_t heads = kv_heads * per_kv;
            Options options = with_dilations(dilations);
            options.offsets = rule;
            options.groups = groups;
            options.gqa_offset = gqa;
            const auto count = static_cast<std::int64_t>(dilations.size());
            const auto members = groups_of_the_oracle(groups, heads, count);
            std::vector<std::int64_t> expected;
            for (std::int64_t b = 0; b < count; ++b) {
              const auto branch = static_cast<std::size_t>(b);
              for (std::int64_t h = 0; h < heads; ++h) {
                const bool by_kv = gqa == "kv";
                expected.push_back(!members[branch].contains(h)
                                       ? -1
                                       : rule_of_the_oracle(rule, b, by_kv ? h / per_kv : h,
                                                            by_kv ? kv_heads : heads,
                                                            dilations[branch]));
              }
            }
            ASSERT_EQ(build_offsets(options, heads, kv_heads), expected)
                << rule << " " << groups << " " << gqa << " " << heads << " " << kv_heads;
          }
        }
      }
    }
  }
}

std::set<std::int64_t> residues(const std::string& rule, std::int64_t heads, std::int64_t r) {
  Options options = with_dilations({r});
  options.offsets = rule;
  const std::vector<std::int64_t> offsets = build_offsets(options, heads, heads);
  return {offsets.begin(), offsets.end()};
}

TEST(OffsetBuilders, ResiduesUnderTheTorchscaleRule) {  // the facts of semantics §2
  EXPECT_EQ(residues("torchscale", 12, 8), (std::set<std::int64_t>{0, 1, 2, 3, 4, 5}));
  EXPECT_EQ(residues("torchscale", 12, 5), (std::set<std::int64_t>{0, 1, 2, 3}));
  EXPECT_EQ(residues("torchscale", 3, 8), (std::set<std::int64_t>{0, 1, 2}));
  for (std::int64_t heads = 1; heads <= 20; ++heads) {
    for (std::int64_t r = 1; r <= 20; ++r) {
      const auto all = static_cast<std::size_t>(r);
      EXPECT_EQ(residues("paper", heads, r).size() == all, heads >= r);
      EXPECT_EQ(residues("torchscale", heads, r).size() == all,
                (heads - 1) / ((heads + r - 1) / r) == r - 1);
    }
  }
}

TEST(OffsetBuilders, TheTableIsTakenAsGiven) {
  Options options = with_dilations({2, 3});
  options.offset_table = {{0, 1, -1, 2, -1, 1}};
  EXPECT_EQ(build_offsets(options, 3, 3), (std::vector<std::int64_t>{0, 1, -1, 2, -1, 1}));
  options.groups = "cumulative";  // heads {0, 1} run branch 0, head {2} branch 1
  EXPECT_EQ(build_offsets(options, 3, 3), (std::vector<std::int64_t>{0, 1, -1, -1, -1, 1}));
}

Shapes shapes_of(std::int64_t seqlen, std::int64_t heads) {
  Shapes shapes;
  shapes.seqlen = seqlen;
  shapes.num_heads = heads;
  shapes.num_kv_heads = heads;
  shapes.head_dim = 8;
  return shapes;
}

struct PresetRow {
  const char* name;
  Merge merge;
  double out_scale;
  Tail tail;
  bool lse_grad;
  bool column_sums;
  std::vector<std::int64_t> offsets;  // H = 5, r = 1, 2, 4
};

TEST(Presets, ResolveToTheTable) {
  const std::vector<std::int64_t> paper = {0, 0, 0, 0, 0, 0, 1, 0, 1, 0, 0, 1, 2, 3, 0};
  const std::vector<std::int64_t> torchscale = {0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 0, 0, 1, 1, 2};
  const std::vector<std::int64_t> cumulative = {0, 0,  -1, -1, -1, -1, -1, 1,
                                                1, -1, -1, -1, -1, -1, 2};
  const std::vector<std::int64_t> literal = {0, 0, -1, -1, -1, -1, -1, 1, 1, -1, -1, -1, 2, -1, -1};
  const std::vector<PresetRow> rows = {
      {"longnet", Merge::kLse, 1.0, Tail::kMask, true, false, paper},
      {"torchscale", Merge::kLse, 1.0, Tail::kPhantom, false, false, torchscale},
      {"head_groups", Merge::kSum, 1.0, Tail::kMask, true, false, cumulative},
      {"fork", Merge::kSum, 1.0 / 3.0, Tail::kMask, true, false, cumulative},
      {"fkodom", Merge::kSum, 1.0 / 3.0, Tail::kMask, true, true, literal},
  };
  std::vector<std::string_view> names;
  for (const PresetRow& row : rows) {
    SCOPED_TRACE(row.name);
    names.push_back(row.name);
    Options options;
    options.segments = {4, 8, 16};
    options.dilations = {1, 2, 4};
    options.preset = row.name;
    const Problem problem = make_problem(options, shapes_of(16, 5));
    EXPECT_EQ(problem.merge, row.merge);
    EXPECT_EQ(problem.out_scale, row.out_scale);
    EXPECT_EQ(problem.tail, row.tail);
    EXPECT_EQ(problem.lse_grad, row.lse_grad);
    EXPECT_EQ(uses_column_sums(options), row.column_sums);
    EXPECT_EQ(build_offsets(options, 5, 5), row.offsets);
    EXPECT_FALSE(problem.is_causal);
    EXPECT_EQ(problem.scale, std::nullopt);
    EXPECT_EQ(problem.dropout_p, 0.0);
    for (std::size_t b = 0; b < 3; ++b) {
      EXPECT_EQ(problem.branches[b].segment, options.segments[b]);
      EXPECT_EQ(problem.branches[b].dilation, options.dilations[b]);
      EXPECT_EQ(
          problem.branches[b].offsets,
          std::vector<std::int64_t>(row.offsets.begin() + static_cast<std::ptrdiff_t>(5 * b),
                                    row.offsets.begin() + static_cast<std::ptrdiff_t>(5 * b + 5)));
    }
  }
  EXPECT_EQ(option_names("preset"), names);
}

TEST(Options, EveryNameIsAcceptedAndNoOther) {
  const auto set = [](std::string_view option, std::string name) {
    Options options;
    options.segments = {4};
    options.dilations = {1};
    (option == "preset"    ? options.preset
     : option == "offsets" ? options.offsets
     : option == "groups"  ? options.groups
     : option == "merge"   ? options.merge
     : option == "tail"    ? options.tail
                           : options.gqa_offset) = std::move(name);
    return make_problem(options, shapes_of(8, 4));
  };
  for (const char* option : {"preset", "offsets", "groups", "merge", "tail", "gqa_offset"}) {
    SCOPED_TRACE(option);
    EXPECT_FALSE(option_names(option).empty());
    for (const std::string_view name : option_names(option)) {
      EXPECT_NO_THROW(set(option, std::string(name))) << name;
    }
    EXPECT_THROW(set(option, "other"), InvalidProblem);
  }
  EXPECT_THROW(option_names("scale"), InvalidProblem);
}

TEST(Presets, WithoutAPresetTheDefaultsAreLongnets) {
  Options options;
  options.segments = {4, 8};
  options.dilations = {1, 2};
  Options named = options;
  named.preset = "longnet";
  EXPECT_EQ(make_problem(options, shapes_of(10, 4)), make_problem(named, shapes_of(10, 4)));
}

TEST(Presets, MayBeOverridden) {  // X3: every option changes the problem
  for (const std::string_view name : option_names("preset")) {
    SCOPED_TRACE(name);
    Options plain;
    plain.segments = {4, 8};
    plain.dilations = {1, 2};
    plain.preset = name;
    const Problem before = make_problem(plain, shapes_of(8, 4));
    Options options = plain;
    options.offsets = "zero";
    options.tail = before.tail == Tail::kMask ? "phantom" : "mask";
    options.scale = 0.5;
    options.is_causal = true;
    options.dropout_p = 0.25;
    const Problem after = make_problem(options, shapes_of(8, 4));
    EXPECT_NE(after.tail, before.tail);
    EXPECT_EQ(after.scale, 0.5);
    EXPECT_TRUE(after.is_causal);
    EXPECT_EQ(after.dropout_p, 0.25);
    for (const Branch& branch : after.branches) {
      for (const std::int64_t offset : branch.offsets) {
        EXPECT_LE(offset, 0);
      }
    }
    if (before.merge == Merge::kLse) {
      options.lse_grad = !before.lse_grad;
      EXPECT_NE(make_problem(options, shapes_of(8, 4)).lse_grad, before.lse_grad);
    }
  }
}

TEST(Presets, GqaOffsetRuleIsAnOption) {
  Options options;
  options.segments = {8};
  options.dilations = {4};
  Shapes shapes = shapes_of(8, 4);
  shapes.num_kv_heads = 2;
  EXPECT_EQ(make_problem(options, shapes).branches[0].offsets,
            (std::vector<std::int64_t>{0, 0, 1, 1}));
  options.gqa_offset = "q";
  EXPECT_EQ(make_problem(options, shapes).branches[0].offsets,
            (std::vector<std::int64_t>{0, 1, 2, 3}));
}

TEST(Presets, TorchscaleRefusesOnlyShiftedRows) {
  Options options;
  options.preset = "torchscale";
  options.segments = {10};
  options.dilations = {4};
  EXPECT_NO_THROW(make_problem(options, shapes_of(10, 2)));  // one segment: nothing shifts
  options.segments = {8};
  EXPECT_NO_THROW(make_problem(options, shapes_of(100, 2)));
}

}  // namespace
}  // namespace dilated
