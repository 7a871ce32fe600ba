// Which key rows travel between ranks that hold contiguous shards of one call: arithmetic on the
// host, the same on every rank, without torch and without lists of rows.
//   rank q sends p the rows of a class that q holds and some query of p sees in a segment that p
//   holds only in part; they become class rows of p (class_rows.h)
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "dilated/class_rows.h"
#include "dilated/problem.h"

namespace dilated {

/// Rows of one class that `from` holds and `to` needs: an arithmetic progression that becomes
/// neighbours.
struct ClassRun {
  std::int64_t from = 0;
  std::int64_t to = 0;
  std::size_t branch = 0;
  std::int64_t kv_head = 0;
  std::int64_t row = 0;        // of the first, in the key tensor of `from`
  std::int64_t step = 0;       // the dilation
  std::int64_t count = 0;      // at least 1
  std::int64_t class_row = 0;  // of the first, in the class rows of `to`

  bool operator==(const ClassRun&) const = default;
};

/// How far rows travel: not at all, between ranks whose numbers follow one another, or farther.
enum class Reach : std::uint8_t { kLocal, kNeighbours, kFar };

class ExchangePlan {
 public:
  std::int64_t num_ranks() const { return static_cast<std::int64_t>(begins_.size()) - 1; }
  /// Rows of the whole call's tensors that a rank holds.
  Range shard(std::int64_t rank) const {
    return {begins_[static_cast<std::size_t>(rank)], begins_[static_cast<std::size_t>(rank) + 1]};
  }
  /// What a rank computes: its windows, keys by class rows.
  Problem local_problem(std::int64_t rank) const;
  /// Rows of a rank's `class_key`.
  std::int64_t class_row_count(std::int64_t rank) const;

  /// Runs that a rank sends, by receiver, branch, segment and column; its own rows, which it
  /// copies, included.
  std::vector<ClassRun> sends(std::int64_t rank) const;
  /// Runs that a rank receives, by sender, branch, segment and column; its own included.
  std::vector<ClassRun> receives(std::int64_t rank) const;
  /// Bytes of keys and values that a rank receives from others.
  std::int64_t received_bytes(std::int64_t rank) const;
  /// True if no row travels: every segment lies inside one shard.
  bool is_local() const { return reach() == Reach::kLocal; }
  Reach reach() const;

  /// Equal for equal calls on equal shards: of shapes and dtype; branches; other options; shards
  /// and sequences. Tells mistakes apart, not attacks.
  std::array<std::uint64_t, 4> hash() const;
  /// Several lines: shards, and what every branch exchanges.
  std::string to_string() const;

 private:
  friend ExchangePlan make_exchange_plan(const Problem& problem,
                                         const std::vector<std::int64_t>& shards);
  ExchangePlan() = default;

  struct Piece;
  std::vector<Piece> pieces(std::int64_t rank) const;
  std::vector<ClassRows> partial_rows(std::int64_t rank, std::int64_t& end) const;
  void add_runs(std::int64_t from, std::int64_t to, const std::vector<ClassRows>& rows_of_to,
                std::vector<ClassRun>& runs) const;
  bool has_partial_segments(std::int64_t rank) const;
  Range neighbours(std::int64_t rank) const;
  std::int64_t rank_of(std::int64_t row) const;

  Problem problem_;                   // of the whole call
  std::vector<std::int64_t> begins_;  // of the shards, and the end
  std::vector<ClassRows> columns_;    // of every branch, without segments
};

/// `problem` is the whole call, without windows; `shards` are the numbers of rows of all ranks, in
/// order, zeros allowed. Throws InvalidProblem if they do not add up to `seqlen`, and what
/// `validate` throws.
ExchangePlan make_exchange_plan(const Problem& problem, const std::vector<std::int64_t>& shards);

}  // namespace dilated
