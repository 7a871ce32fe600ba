// What the CUDA back end decides, without a device: its tables hand out every row exactly once, the
// tiles fit into shared memory, the workspace is that of docs/architecture.md.
#include <cstring>
#include <map>
#include <tuple>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "src/geometry.h"
#include "src/kernels/cuda/decision.h"
#include "tests/support/random_problem.h"

namespace dilated::gpu {
namespace {

using testing::RandomCase;

template <typename T>
std::vector<T> table(const CudaDecision& decision, std::int64_t at, std::size_t count) {
  std::vector<T> entries(count);
  if (count > 0) {
    std::memcpy(entries.data(), decision.tables.data() + at, count * sizeof(T));
  }
  return entries;
}

/// The group that a tile belongs to, as kernels find it: the last that begins at or before it.
const TileGroup& group_of(const std::vector<TileGroup>& groups, std::int64_t tile) {
  std::size_t found = 0;
  for (std::size_t i = 0; i < groups.size(); ++i) {
    found = groups[i].first_tile <= tile ? i : found;
  }
  return groups[found];
}

/// (branch, sequence, position) -> how many tiles hold it, over all residues.
using Counts = std::map<std::tuple<std::int32_t, std::int32_t, std::int64_t>, int>;

Counts count_rows(const Plan& plan, const std::vector<TileGroup>& groups, std::int64_t tiles,
                  std::int64_t tile_rows, bool of_queries) {
  Counts counts;
  for (std::int64_t tile = 0; tile < tiles; ++tile) {
    const TileGroup& group = group_of(groups, tile);
    const Sequence& sequence = plan.sequences()[static_cast<std::size_t>(group.sequence)];
    const Branch& branch = plan.problem().branches[static_cast<std::size_t>(group.branch)];
    const BranchGeometry geometry(sequence.length, branch.segment, branch.dilation);
    const std::int64_t index = tile - group.first_tile;
    const std::int64_t segment = group.first_segment + index / group.tiles_per_segment;
    for (std::int64_t residue = 0; residue < branch.dilation; ++residue) {
      const RowSpan span =
          geometry.span(segment, residue, of_queries ? sequence.queries : sequence.keys, 0);
      const std::int64_t first = span.first + index % group.tiles_per_segment * tile_rows;
      for (std::int64_t row = first; row < std::min(first + tile_rows, span.last); ++row) {
        ++counts[{group.branch, group.sequence, geometry.position(segment, residue, row)}];
      }
    }
  }
  return counts;
}

Counts every_row_once(const Plan& plan, bool of_queries) {
  Counts counts;
  for (std::size_t b = 0; b < plan.problem().branches.size(); ++b) {
    for (std::size_t s = 0; s < plan.sequences().size(); ++s) {
      const Sequence& sequence = plan.sequences()[s];
      const Range window = of_queries ? sequence.queries : sequence.keys;
      for (std::int64_t p = window.begin; p < window.end; ++p) {
        counts[{static_cast<std::int32_t>(b), static_cast<std::int32_t>(s), p}] = 1;
      }
    }
  }
  return counts;
}

TEST(CudaDecision, TilesHoldEveryRowOnce) {
  testing::check_property(
      "tiles", 300, {.dtype = DType::kFloat32, .max_seqlen = 300, .max_head_dim = 256},
      [](const RandomCase& drawn) -> std::string {
        const Plan plan = make_plan(drawn.problem, "cpu");
        const CudaDecision decision(plan);
        const std::size_t groups = plan.problem().branches.size() * plan.sequences().size();
        const auto queries = table<TileGroup>(decision, decision.at.query_groups, groups);
        const auto keys = table<TileGroup>(decision, decision.at.key_groups, groups);
        if (count_rows(plan, queries, decision.query_tiles.back(), decision.tiles.rows, true) !=
            every_row_once(plan, true)) {
          return "query rows";
        }
        if (count_rows(plan, keys, decision.key_tiles.back(), decision.tiles.rows, false) !=
            every_row_once(plan, false)) {
          return "key rows";
        }
        Problem hopper = drawn.problem;
        hopper.dtype = DType::kBFloat16;
        hopper.head_dim = 64;
        hopper.alignment = 16;
        const Plan hopper_plan = make_plan(hopper, "cpu");
        const CudaDecision forward(hopper_plan, {.capability = 90});
        if (forward.not_sm90.empty() &&
            count_rows(hopper_plan, table<TileGroup>(forward, forward.at.forward_groups, groups),
                       forward.forward_tiles.back(), forward_rows(64),
                       true) != every_row_once(hopper_plan, true)) {
          return "query rows of the Hopper forward";
        }
        if (forward.not_sm90.empty() &&
            (count_rows(hopper_plan,
                        table<TileGroup>(forward, forward.at.backward_query_groups, groups),
                        forward.backward_query_tiles.back(), kBackwardRows,
                        true) != every_row_once(hopper_plan, true) ||
             count_rows(hopper_plan,
                        table<TileGroup>(forward, forward.at.backward_key_groups, groups),
                        forward.backward_key_tiles.back(), kBackwardRows,
                        false) != every_row_once(hopper_plan, false))) {
          return "rows of the Hopper backward";
        }
        const auto rows =
            table<TileGroup>(decision, decision.at.row_groups, plan.sequences().size());
        std::int64_t tiles = 0;
        for (const TileGroup& group : rows) {
          const Sequence& sequence = plan.sequences()[static_cast<std::size_t>(group.sequence)];
          if (group.first_tile != tiles) {
            return "rows of the merge";
          }
          tiles += ceil_div(sequence.queries.size(), decision.merge_rows);
        }
        return tiles == decision.row_tiles ? "" : "rows of the merge";
      });
}

TEST(CudaDecision, TablesAreThoseOfThePlan) {
  Problem problem = testing::paper_problem(300, 3, 40, {{64, 1}, {16, 4}, {64, 2}});
  problem.branches[2].offsets[1] = -1;
  const Plan plan = make_plan(problem, "cpu");
  const CudaDecision decision(plan);
  EXPECT_THAT(decision.branch_order, ::testing::ElementsAre(1, 0, 2));
  const auto shapes = table<BranchShape>(decision, decision.at.branches, 3);
  const auto offsets = table<std::int64_t>(decision, decision.at.offsets, 9);
  for (std::size_t b = 0; b < 3; ++b) {
    EXPECT_EQ(shapes[b].segment, problem.branches[b].segment);
    EXPECT_EQ(shapes[b].dilation, problem.branches[b].dilation);
    for (std::size_t h = 0; h < 3; ++h) {
      EXPECT_EQ(offsets[3 * b + h], problem.branches[b].offsets[h]);
    }
  }
  const auto sequences = table<Sequence>(decision, decision.at.sequences, 1);
  EXPECT_EQ(sequences[0].length, 300);
}

/// A problem that the Hopper forward takes; cases change one thing.
Problem hopper_problem() {
  Problem problem = testing::paper_problem(1000, 4, 64, {{512, 4}, {256, 1}});
  problem.dtype = DType::kBFloat16;
  problem.alignment = 16;
  return problem;
}
constexpr Target kHopper = {.capability = 90, .has_sm90 = true};

TEST(CudaDecision, HopperForwardOrTheReasonAgainstIt) {
  const auto reason = [](const auto& change, const Target& target) {
    Problem problem = hopper_problem();
    change(problem);
    const CudaDecision decision(make_plan(problem, "cpu"), target);
    const bool says =
        decision.to_string().find("sm_80 (" + decision.not_sm90 + ")") != std::string::npos;
    EXPECT_NE(decision.not_sm90.empty(), says) << decision.to_string();
    return decision.not_sm90;
  };
  const auto nothing = [](Problem&) {};
  EXPECT_EQ(reason(nothing, kHopper), "");
  EXPECT_EQ(reason([](Problem& p) { p.dtype = DType::kFloat16; }, kHopper), "");
  EXPECT_EQ(reason([](Problem& p) { p.head_dim = 128; }, kHopper), "");
  EXPECT_EQ(reason([](Problem& p) { p.cu_seqlens = {0, 300, 300, 1000}; }, kHopper), "");
  EXPECT_EQ(reason([](Problem& p) { p.windows = {{{10, 90}, {0, 200}}}; }, kHopper), "");
  EXPECT_EQ(reason([](Problem& p) { p.has_seqused = true; }, kHopper), "");
  EXPECT_EQ(reason(nothing, {.capability = 80}), "compute capability 8.0");
  EXPECT_EQ(reason(nothing, {.capability = 90, .has_sm90 = false}), "not compiled for 90a");
  EXPECT_EQ(reason([](Problem& p) { p.dtype = DType::kFloat32; }, kHopper), "dtype float32");
  for (const std::int64_t head_dim : {8, 24, 48, 96, 120}) {
    EXPECT_EQ(reason([&](Problem& p) { p.head_dim = head_dim; }, kHopper), "") << head_dim;
  }
  EXPECT_EQ(reason([](Problem& p) { p.head_dim = 20; }, kHopper), "head_dim 20");
  EXPECT_EQ(reason([](Problem& p) { p.head_dim = 136; }, kHopper), "head_dim 136");
  EXPECT_EQ(reason([](Problem& p) { p.alignment = 8; }, kHopper), "alignment of 8 bytes");
  EXPECT_EQ(reason([](Problem& p) { p.has_key_mask = true; }, kHopper), "key mask");
  EXPECT_EQ(reason([](Problem& p) { p.dropout_p = 0.1; }, kHopper), "dropout");
  EXPECT_EQ(reason([](Problem& p) { p.tail = Tail::kPhantom; }, kHopper), "phantom keys");
  EXPECT_EQ(reason([](Problem& p) { p.branches.resize(9, p.branches[0]); }, kHopper), "9 branches");
}

/// The kernel of a dense branch merges the others if it is the first of the merge.
TEST(CudaDecision, DenseBranchMerges) {
  const auto merges = [](const auto& change) {
    Problem problem = hopper_problem();
    change(problem);
    return CudaDecision(make_plan(problem, "cpu"), kHopper).merges_in_dense;
  };
  EXPECT_TRUE(merges([](Problem&) {}));
  EXPECT_TRUE(merges([](Problem& p) { p.cu_seqlens = {0, 300, 1000}; }));
  EXPECT_FALSE(merges([](Problem& p) { p.branches[1].segment = 600; }));  // not the first
  EXPECT_FALSE(merges([](Problem& p) { p.branches[1].offsets[2] = -1; }));
  EXPECT_FALSE(merges([](Problem& p) { p.merge = Merge::kMean; }));
  EXPECT_FALSE(merges([](Problem& p) { p.lse_grad = false; }));
  EXPECT_FALSE(merges([](Problem& p) { p.windows = {{{10, 90}, {0, 200}}}; }));
  EXPECT_FALSE(merges([](Problem& p) { p.has_seqused = true; }));
}

/// In backward it writes the gradients, unless query heads of a group see different rows of a key.
TEST(CudaDecision, DenseBranchWritesGradients) {
  const auto merges = [](const auto& change) {
    Problem problem = hopper_problem();
    change(problem);
    return CudaDecision(make_plan(problem, "cpu"), kHopper).merges_gradients;
  };
  EXPECT_TRUE(merges([](Problem&) {}));
  EXPECT_TRUE(merges([](Problem& p) { p.lse_grad = false; }));
  EXPECT_TRUE(merges([](Problem& p) { p.merge = Merge::kMean; }));
  EXPECT_FALSE(merges([](Problem& p) { p.branches[1].segment = 600; }));  // not the first
  EXPECT_FALSE(merges([](Problem& p) { p.has_seqused = true; }));
  EXPECT_FALSE(merges([](Problem& p) {
    p.num_kv_heads = 2;
    p.branches[0].offsets = {0, 1, 2, 3};
  }));
  EXPECT_TRUE(merges([](Problem& p) {
    p.num_kv_heads = 2;
    p.branches[0].offsets = {0, 0, 1, 1};
  }));
}

/// Four tiles of rows, 16 bytes further apart than they are long, and what one passing row needs.
TEST(CudaDecision, TilesFitIntoTheSharedMemoryOfTheSmallestCards) {
  constexpr int kSharedBytes = 99 * 1024;
  for (const int bytes : {2, 4}) {
    for (const int head_dim : kPaddedHeadDims) {
      const TileShape tiles = tile_shape(head_dim * bytes);
      const int row = head_dim * bytes + 16;
      EXPECT_LE(row * (tiles.rows + 2 * tiles.forward_columns) + tiles.forward_columns,
                kSharedBytes);
      EXPECT_LE(2 * row * (tiles.rows + tiles.backward_columns) + 17 * tiles.backward_columns,
                kSharedBytes);
    }
  }
}

TEST(CudaDecision, HeadDimsArePadded) {
  for (const auto& [head_dim, padded] :
       {std::pair{1, 32}, {32, 32}, {33, 64}, {64, 64}, {96, 128}, {129, 256}, {256, 256}}) {
    const Plan plan = make_plan(testing::paper_problem(9, 2, head_dim, {{4, 1}}), "cpu");
    EXPECT_EQ(CudaDecision(plan).padded_head_dim, padded);
  }
  for (const auto& [head_dim, padded] :
       {std::pair{8, 32}, {40, 48}, {72, 96}, {120, 128}, {136, 0}}) {
    const Plan plan = make_plan(testing::paper_problem(9, 2, head_dim, {{4, 1}}), "cpu");
    EXPECT_EQ(CudaDecision(plan).hopper_head_dim, padded);
  }
}

/// The formula of docs/architecture.md, pieces rounded up to 256 bytes.
TEST(CudaDecision, WorkspaceIsThatOfTheFormula) {
  const auto pieces = [](std::int64_t bytes) { return (bytes + 255) / 256 * 256; };
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    Problem problem = testing::paper_problem(150, 4, 24, {{50, 1}, {100, 3}});
    problem.dtype = dtype;
    problem.batch = 3;
    problem.num_kv_heads = 2;
    const Plan plan = make_plan(problem, "cpu");
    const CudaDecision decision(plan);
    const std::int64_t tables = pieces(104 * 3 + 80 * 3 * 2 + (16 + 8 * 4) * 2);
    const std::int64_t rows = 3 * 4 * plan.branch_rows();
    EXPECT_EQ(decision.workspace_bytes(Pass::kForward),
              tables + pieces(rows * 8) + pieces(rows * 4 * 24));
    const std::int64_t sums = dtype == DType::kFloat32
                                  ? 0
                                  : pieces(4 * 3 * 24 * 150 * 4) + 2 * pieces(4 * 3 * 24 * 150 * 2);
    EXPECT_EQ(decision.workspace_bytes(Pass::kBackward), tables + pieces(rows * 16) + sums);
  }
}

}  // namespace
}  // namespace dilated::gpu
