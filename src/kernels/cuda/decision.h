// What the CUDA back end decides for a problem: tiles, the order of branches, scratch, and the
// tables that its kernels read. A pure function of the plan: no device is asked.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "dilated/decision.h"
#include "dilated/plan.h"

namespace dilated::gpu {

/// Head dims that kernels exist for; others are padded with zeros to the next one.
inline constexpr int kPaddedHeadDims[] = {32, 64, 128, 256};
inline constexpr std::int64_t kMaxHeadDim = 256;

/// Rows of the tile that stays in shared memory, 16 per warp, and of the tiles that pass by.
/// Sizes are those at which the four tiles of backward fit into the 99 KB of the smallest cards.
struct TileShape {
  int rows;
  int forward_columns;
  int backward_columns;
};
constexpr TileShape tile_shape(int row_bytes) {
  if (row_bytes <= 256) {
    return {64, 64, 64};
  }
  return row_bytes <= 512 ? TileShape{64, 32, 16} : TileShape{32, 16, 16};
}

/// Head dims of the kernels of Hopper (sm_90a); other multiples of 8 run in the next one, whose
/// further columns the copy engine fills with zeros.
inline constexpr int kHopperHeadDims[] = {32, 48, 64, 96, 128};

/// Forward on Hopper: query rows of a tile, keys that pass by at once, most branches.
constexpr int forward_rows(int head_dim) { return head_dim <= 64 ? 192 : 128; }
inline constexpr int kForwardKeys = 128;
inline constexpr std::int64_t kMostBranches = 8;
/// Backward there: query rows of a tile for dQ, key rows for dK and dV.
inline constexpr int kBackwardRows = 128;

/// Which kernels there are to choose from.
struct Target {
  std::int64_t capability = 80;  // 10 * major + minor
  bool has_sm90 = true;          // built
};

/// Tiles of one branch on one sequence, or of all rows of one sequence. A sequence that is cut
/// (seqused) has no more segments and rows than a whole one: blocks beyond its end find nothing.
struct TileGroup {
  std::int64_t first_tile = 0;  // among those of all groups
  std::int64_t first_segment = 0;
  std::int64_t tiles_per_segment = 1;
  std::int64_t row_begin = 0;  // plan.branch_row_begin()
  std::int32_t sequence = 0;
  std::int32_t branch = 0;
};

struct BranchShape {
  std::int64_t segment;
  std::int64_t dilation;
};

/// Where the tables lie in their one block of memory, in bytes.
struct TableOffsets {
  std::int64_t sequences = 0;       // Sequence per sequence
  std::int64_t branches = 0;        // BranchShape per branch
  std::int64_t offsets = 0;         // residue per (branch, head), int64
  std::int64_t query_groups = 0;    // TileGroup per (rank of branch, sequence), tiles of query rows
  std::int64_t key_groups = 0;      // the same, tiles of key rows
  std::int64_t forward_groups = 0;  // like query_groups, in tiles of the Hopper forward
  std::int64_t backward_query_groups = 0;  // like query_groups and key_groups, in tiles of the
  std::int64_t backward_key_groups = 0;    // Hopper backward
  std::int64_t row_groups = 0;             // TileGroup per sequence: all of its query rows
};

struct CudaDecision final : Decision {
  /// Why the sm_80 kernels run; empty: those of sm_90a.
  std::string not_sm90;
  /// The first branch of the merge is dense and runs in every head: its kernel merges the others.
  bool merges_in_dense;
  /// Backward on sm_90a: it writes the gradients, the others before it leave their parts.
  bool merges_gradients;
  int padded_head_dim;  // of sm_80
  int hopper_head_dim;  // of sm_90a; 0: none
  TileShape tiles;
  /// Branch numbers in ascending order of segment length: the order of merges; backward goes down.
  std::vector<std::size_t> branch_order;
  /// Query rows of one block of the merge.
  std::int64_t merge_rows;
  // Tiles before each rank of branch_order, and in all.
  std::vector<std::int64_t> query_tiles;
  std::vector<std::int64_t> key_tiles;
  std::vector<std::int64_t> forward_tiles;         // of sm_90a
  std::vector<std::int64_t> backward_query_tiles;  // of sm_90a
  std::vector<std::int64_t> backward_key_tiles;    // of sm_90a
  std::int64_t row_tiles;
  std::vector<std::byte> tables;
  TableOffsets at;

  // Workspace, each piece in bytes. Tables come first.
  std::int64_t table_bytes;
  std::int64_t tickets;         // on sm_90a: which tile is next, two launches per branch
  std::int64_t branch_sums;     // forward: (max, sum) of every branch row
  std::int64_t branch_out;      // forward: O_b of every branch row, float32
  std::int64_t row_numbers;     // backward: (base, residual, delta) of every branch row
  std::int64_t part_rows;       // of parts of gradients; rows of a dense branch 0 are left out
  std::int64_t query_gradient;  // backward: float32 sums, or parts, of gradients that are rounded
  std::int64_t key_gradient;    // once for dkey, once for dvalue

  explicit CudaDecision(const Plan& plan, const Target& target = {});
  std::int64_t workspace_bytes(Pass pass) const override;
  std::string to_string() const override;
};

/// Most branches of a problem: the merge keeps two numbers per branch in shared memory.
inline constexpr std::int64_t kMaxBranches = 2048;

}  // namespace dilated::gpu
