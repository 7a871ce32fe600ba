// Tiles, tables and scratch of the CUDA back end.
#include "src/kernels/cuda/decision.h"

#include <algorithm>
#include <cstring>
#include <span>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "src/branches.h"
#include "src/geometry.h"

namespace dilated::gpu {
namespace {

constexpr std::int64_t kPiece = 256;  // pieces of the workspace start at multiples of it

constexpr std::int64_t whole_pieces(std::int64_t bytes) { return ceil_div(bytes, kPiece) * kPiece; }

/// Appends `values` to `block` and returns where they begin.
template <typename T>
std::int64_t append(std::vector<std::byte>& block, const std::vector<T>& values) {
  const std::size_t begin = block.size();
  block.resize(begin + values.size() * sizeof(T));
  if (!values.empty()) {
    std::memcpy(block.data() + begin, values.data(), values.size() * sizeof(T));
  }
  return static_cast<std::int64_t>(begin);
}

/// Groups of one branch's tiles of `rows` rows, of all sequences; `window` picks queries or keys.
template <typename Window>
void add_groups(const Plan& plan, std::size_t branch, std::int64_t rows, const Window& window,
                std::vector<TileGroup>& groups, std::int64_t& tiles) {
  const Branch& shape = plan.problem().branches[branch];
  for (std::size_t s = 0; s < plan.sequences().size(); ++s) {
    const Sequence& sequence = plan.sequences()[s];
    TileGroup group;
    group.first_tile = tiles;
    group.sequence = static_cast<std::int32_t>(s);
    group.branch = static_cast<std::int32_t>(branch);
    group.row_begin = plan.branch_row_begin(branch, s);
    const Range positions = window(sequence);
    if (positions.size() > 0) {
      const BranchGeometry geometry(sequence.length, shape.segment, shape.dilation);
      group.first_segment = positions.begin / geometry.segment;
      group.tiles_per_segment =
          ceil_div(std::min(geometry.slots(), positions.size() / geometry.dilation + 1), rows);
      const std::int64_t segments =
          (positions.end - 1) / geometry.segment + 1 - group.first_segment;
      tiles += segments * group.tiles_per_segment;
    }
    groups.push_back(group);
  }
}

/// The smallest of `kernels` that holds a head_dim; 0 if there is none.
int padded(std::int64_t head_dim, std::span<const int> kernels) {
  const auto found = std::lower_bound(kernels.begin(), kernels.end(), head_dim);
  return found == kernels.end() ? 0 : *found;
}

/// What keeps a problem from the Hopper kernels.
std::string reason_against_sm90(const Plan& plan, const Target& target) {
  const Problem& problem = plan.problem();
  if (target.capability != 90) {
    return fmt::format("compute capability {}.{}", target.capability / 10, target.capability % 10);
  }
  if (!target.has_sm90) {
    return "not compiled for 90a";
  }
  if (problem.dtype != DType::kBFloat16 && problem.dtype != DType::kFloat16) {
    return fmt::format("dtype {}", name_of(problem.dtype));
  }
  if (problem.head_dim % 8 != 0 || padded(problem.head_dim, kHopperHeadDims) == 0) {
    return fmt::format("head_dim {}", problem.head_dim);
  }
  if (problem.alignment < 16) {
    return problem.alignment == 0 ? "alignment unknown"
                                  : fmt::format("alignment of {} bytes", problem.alignment);
  }
  if (problem.has_key_mask) {
    return "key mask";
  }
  if (problem.dropout_p > 0.0) {
    return "dropout";
  }
  if (problem.tail == Tail::kPhantom && !problem.is_causal) {
    return "phantom keys";
  }
  if (static_cast<std::int64_t>(problem.branches.size()) > kMostBranches) {
    return fmt::format("{} branches", problem.branches.size());
  }
  constexpr std::int64_t kMostRows = std::int64_t{1} << 30;  // of numbers in 32 bits
  if (problem.seqlen > kMostRows || problem.query_rows() > kMostRows ||
      problem.key_rows() > kMostRows) {
    return "more than 2^30 rows";
  }
  if (plan.branch_rows() >= std::int64_t{1} << 31) {
    return "2^31 rows of branches or more";
  }
  return "";
}

/// Whether the rows of a branch are all rows.
bool is_dense(const Problem& problem, std::size_t b) {
  const Branch& branch = problem.branches[b];
  return branch.dilation == 1 && problem.windows.empty() && !problem.has_seqused &&
         std::all_of(branch.offsets.begin(), branch.offsets.end(),
                     [](std::int64_t offset) { return offset == 0; });
}

/// Whether the query heads of every key/value head see the same rows of each branch.
bool shares_rows(const Problem& problem) {
  const auto group = static_cast<std::size_t>(problem.heads_per_kv_head());
  return std::all_of(problem.branches.begin(), problem.branches.end(), [&](const Branch& branch) {
    for (std::size_t h = 0; h < branch.offsets.size(); ++h) {
      if (branch.offsets[h] != branch.offsets[h / group * group]) {
        return false;
      }
    }
    return true;
  });
}

}  // namespace

CudaDecision::CudaDecision(const Plan& plan, const Target& target)
    : not_sm90(reason_against_sm90(plan, target)),
      merges_in_dense(false),
      merges_gradients(false),
      padded_head_dim(padded(plan.problem().head_dim, kPaddedHeadDims)),
      hopper_head_dim(padded(plan.problem().head_dim, kHopperHeadDims)),
      tiles(tile_shape(padded_head_dim * static_cast<int>(size_of(plan.problem().dtype)))),
      branch_order(ascending_branches(plan.problem())) {
  const Problem& problem = plan.problem();
  merge_rows = std::clamp<std::int64_t>(
      kMaxBranches / static_cast<std::int64_t>(problem.branches.size()), 1, 32);

  std::vector<BranchShape> shapes;
  std::vector<std::int64_t> offsets;
  for (const Branch& branch : problem.branches) {
    shapes.push_back({branch.segment, branch.dilation});
    offsets.insert(offsets.end(), branch.offsets.begin(), branch.offsets.end());
  }
  std::vector<TileGroup> query_groups;
  std::vector<TileGroup> key_groups;
  query_tiles = key_tiles = {0};
  for (const std::size_t branch : branch_order) {
    query_tiles.push_back(query_tiles.back());
    add_groups(
        plan, branch, tiles.rows, [](const Sequence& s) { return s.queries; }, query_groups,
        query_tiles.back());
    key_tiles.push_back(key_tiles.back());
    add_groups(
        plan, branch, tiles.rows, [](const Sequence& s) { return s.keys; }, key_groups,
        key_tiles.back());
  }
  std::vector<TileGroup> forward_groups;
  std::vector<TileGroup> backward_query_groups;
  std::vector<TileGroup> backward_key_groups;
  if (not_sm90.empty()) {
    const bool dense = is_dense(problem, branch_order.front());
    merges_in_dense = dense && problem.merge == Merge::kLse && !plan.needs_branch_outputs();
    merges_gradients = dense && shares_rows(problem);
    forward_tiles = backward_query_tiles = backward_key_tiles = {0};
    for (const std::size_t branch : branch_order) {
      forward_tiles.push_back(forward_tiles.back());
      add_groups(
          plan, branch, forward_rows(hopper_head_dim), [](const Sequence& s) { return s.queries; },
          forward_groups, forward_tiles.back());
      backward_query_tiles.push_back(backward_query_tiles.back());
      add_groups(
          plan, branch, kBackwardRows, [](const Sequence& s) { return s.queries; },
          backward_query_groups, backward_query_tiles.back());
      backward_key_tiles.push_back(backward_key_tiles.back());
      add_groups(
          plan, branch, kBackwardRows, [](const Sequence& s) { return s.keys; },
          backward_key_groups, backward_key_tiles.back());
    }
    const std::int64_t most =
        std::max({forward_tiles.back(), backward_query_tiles.back(), backward_key_tiles.back()});
    if (most * problem.num_heads >= std::int64_t{1} << 31) {
      not_sm90 = "2^31 tiles or more";
      merges_in_dense = merges_gradients = false;
      forward_groups.clear();
      backward_query_groups.clear();
      backward_key_groups.clear();
    }
  }
  std::vector<TileGroup> row_groups;
  row_tiles = 0;
  for (std::size_t s = 0; s < plan.sequences().size(); ++s) {
    row_groups.push_back({.first_tile = row_tiles, .sequence = static_cast<std::int32_t>(s)});
    row_tiles += ceil_div(plan.sequences()[s].queries.size(), merge_rows);
  }
  at.sequences = append(tables, plan.sequences());
  at.branches = append(tables, shapes);
  at.offsets = append(tables, offsets);
  at.query_groups = append(tables, query_groups);
  at.key_groups = append(tables, key_groups);
  at.forward_groups = append(tables, forward_groups);
  at.backward_query_groups = append(tables, backward_query_groups);
  at.backward_key_groups = append(tables, backward_key_groups);
  at.row_groups = append(tables, row_groups);

  const std::int64_t rows = problem.batch * problem.num_heads * plan.branch_rows();
  const bool rounds = problem.dtype != DType::kFloat32;
  table_bytes = whole_pieces(static_cast<std::int64_t>(tables.size()));
  tickets = not_sm90.empty()
                ? whole_pieces(2 * static_cast<std::int64_t>(sizeof(int) * branch_order.size()))
                : 0;
  branch_sums = whole_pieces(rows * 8);
  branch_out = whole_pieces(rows * 4 * problem.head_dim);
  row_numbers = whole_pieces(rows * 16);
  part_rows = plan.branch_rows();
  if (merges_gradients && branch_order.front() == 0 && !plan.sequences().empty()) {
    part_rows -= problem.branches.size() > 1 ? plan.branch_row_begin(1, 0) : part_rows;
  }
  // Sums of all rows, also where parts take less: dO may come in float32.
  const auto gradient = [&](std::int64_t heads, std::int64_t sum_rows) {
    const std::int64_t most = merges_gradients ? std::max(sum_rows, part_rows) : sum_rows;
    return rounds ? whole_pieces(problem.batch * heads * most * 4 * problem.head_dim) : 0;
  };
  query_gradient = gradient(problem.num_heads, problem.query_rows());
  key_gradient = gradient(problem.num_kv_heads, problem.key_rows());
}

std::int64_t CudaDecision::workspace_bytes(Pass pass) const {
  return pass == Pass::kForward
             ? table_bytes + tickets + branch_sums + branch_out
             : table_bytes + tickets + row_numbers + query_gradient + 2 * key_gradient;
}

std::string CudaDecision::to_string() const {
  const std::string merge = merges_in_dense
                                ? fmt::format("merged by branch {}", branch_order.front())
                                : fmt::format("merge of {} rows, {} blocks", merge_rows, row_tiles);
  const std::string forward =
      not_sm90.empty()
          ? fmt::format("sm_90a, tiles {} x {}, {} per head; {}", forward_rows(hopper_head_dim),
                        kForwardKeys, forward_tiles.back(), merge)
          : fmt::format("sm_80 ({}), tiles {} x {}, {} per head; {}", not_sm90, tiles.rows,
                        tiles.forward_columns, query_tiles.back(), merge);
  const std::string backward =
      not_sm90.empty()
          ? fmt::format("sm_90a (sm_80 if dout is float32), tiles {}, {} + {} per head; {}",
                        kBackwardRows, backward_query_tiles.back(), backward_key_tiles.back(),
                        merges_gradients ? fmt::format("merged by branch {}", branch_order.front())
                                         : "summed branch by branch")
          : fmt::format("sm_80 ({}), tiles {} x {}, {} + {} per head", not_sm90, tiles.rows,
                        tiles.backward_columns, query_tiles.back(), key_tiles.back());
  return fmt::format(
      "head_dim      as {}\nbranch order  [{}]\nforward       {}\nbackward      {}\n",
      not_sm90.empty() ? hopper_head_dim : padded_head_dim, fmt::join(branch_order, ", "), forward,
      backward);
}

}  // namespace dilated::gpu
