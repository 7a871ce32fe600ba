// Row sets of an exchange, from the partial segments of every shard.
#include "dilated/exchange_plan.h"

#include <algorithm>
#include <bit>
#include <initializer_list>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "dilated/error.h"

#include "src/class_rows.h"

namespace dilated {

/// What a shard holds of one sequence.
struct ExchangePlan::Piece {
  std::size_t sequence;
  std::int64_t begin;   // of the sequence, in the rows of the whole call
  std::int64_t length;  // of the sequence
  Range window;         // positions of the sequence
};

/// The sequences at both ends of a shard: all between lie inside it.
std::vector<ExchangePlan::Piece> ExchangePlan::pieces(std::int64_t rank) const {
  const Range rows = shard(rank);
  if (rows.size() == 0 || problem_.batch == 0) {
    return {};
  }
  if (problem_.cu_seqlens.empty()) {
    return {{0, 0, problem_.seqlen, rows}};
  }
  const std::vector<std::int64_t>& cu = problem_.cu_seqlens;
  const auto piece_at = [&](std::int64_t row) {
    const auto next = std::upper_bound(cu.begin(), cu.end(), row);
    const std::int64_t begin = *(next - 1);
    return Piece{static_cast<std::size_t>(next - cu.begin() - 1),
                 begin,
                 *next - begin,
                 {std::max(rows.begin, begin) - begin, std::min(rows.end, *next) - begin}};
  };
  std::vector<Piece> result = {piece_at(rows.begin)};
  const Piece last = piece_at(rows.end - 1);
  if (last.sequence != result.front().sequence) {
    result.push_back(last);
  }
  return result;
}

std::vector<ClassRows> ExchangePlan::partial_rows(std::int64_t rank, std::int64_t& end) const {
  std::vector<ClassRows> rows = columns_;
  const std::vector<Piece> held = pieces(rank);
  for (std::size_t b = 0; b < rows.size(); ++b) {
    for (const Piece& piece : held) {
      add_partial_segments(problem_.branches[b], problem_.is_causal, piece.length, piece.window,
                           piece.sequence, rows[b], end);
    }
  }
  return rows;
}

void ExchangePlan::add_runs(std::int64_t from, std::int64_t to,
                            const std::vector<ClassRows>& rows_of_to,
                            std::vector<ClassRun>& runs) const {
  const Range held = shard(from);
  const Range wanted = shard(to);
  const auto clip = [](Range rows, Range by) {
    const std::int64_t begin = std::max(rows.begin, by.begin);
    return Range{begin, std::max(begin, std::min(rows.end, by.end))};
  };
  for (std::size_t b = 0; b < rows_of_to.size(); ++b) {
    const Branch& branch = problem_.branches[b];
    for (const PartialSegment& part : rows_of_to[b].segments) {
      const bool packed = !problem_.cu_seqlens.empty();
      const std::int64_t begin = packed ? problem_.cu_seqlens[part.sequence] : 0;
      const std::int64_t length =
          packed ? problem_.cu_seqlens[part.sequence + 1] - begin : problem_.seqlen;
      const BranchGeometry geometry(length, branch.segment, branch.dilation);
      const auto local = [begin](Range rows) {
        return Range{rows.begin - begin, rows.end - begin};
      };
      const Range keys = clip(part.positions, local(held));
      const std::int64_t segment_begin = geometry.segment_begin(part.segment);
      const Range queries = clip(
          {segment_begin, segment_begin + geometry.segment_length(part.segment)}, local(wanted));
      if (keys.size() == 0) {
        continue;
      }
      for (std::size_t c = 0; c < rows_of_to[b].columns.size(); ++c) {
        const ClassColumn& column = rows_of_to[b].columns[c];
        const RowSpan span = geometry.span(part.segment, column.offset, keys, 0);
        if (span.empty() || geometry.span(part.segment, column.offset, queries, 0).empty()) {
          continue;
        }
        const std::int64_t first = geometry.position(part.segment, column.offset, span.first);
        runs.push_back({from, to, b, column.kv_head, begin + first - held.begin, branch.dilation,
                        span.last - span.first,
                        part.row + static_cast<std::int64_t>(c) * part.rows + span.first});
      }
    }
  }
}

std::int64_t ExchangePlan::rank_of(std::int64_t row) const {
  return std::upper_bound(begins_.begin(), begins_.end(), row) - begins_.begin() - 1;
}

/// Ranks that hold rows of a segment that `rank` holds only in part, and those between.
Range ExchangePlan::neighbours(std::int64_t rank) const {
  Range ranks{rank, rank + 1};
  for (const Piece& piece : pieces(rank)) {
    for (const Branch& branch : problem_.branches) {
      const BranchGeometry geometry(piece.length, branch.segment, branch.dilation);
      const std::int64_t first = piece.window.begin / geometry.segment;
      const std::int64_t last = (piece.window.end - 1) / geometry.segment;
      const std::int64_t end = geometry.segment_begin(last) + geometry.segment_length(last);
      ranks.begin = std::min(ranks.begin, rank_of(piece.begin + geometry.segment_begin(first)));
      ranks.end = std::max(ranks.end, rank_of(piece.begin + end - 1) + 1);
    }
  }
  return ranks;
}

Problem ExchangePlan::local_problem(std::int64_t rank) const {
  Problem local = problem_;
  local.key_layout = KeyLayout::kClassRows;
  const Range rows = shard(rank);
  const bool packed = !problem_.cu_seqlens.empty();
  for (std::int64_t s = 0; s < problem_.num_sequences(); ++s) {
    const auto at = static_cast<std::size_t>(s);
    const Range sequence = packed ? Range{problem_.cu_seqlens[at], problem_.cu_seqlens[at + 1]}
                                  : Range{0, problem_.seqlen};
    const std::int64_t begin = std::clamp(rows.begin, sequence.begin, sequence.end);
    const std::int64_t end = std::clamp(rows.end, sequence.begin, sequence.end);
    const Range window{begin - sequence.begin, end - sequence.begin};
    local.windows.push_back({window, window});
  }
  return local;
}

std::int64_t ExchangePlan::class_row_count(std::int64_t rank) const {
  std::int64_t end = 0;
  partial_rows(rank, end);
  return end;
}

std::vector<ClassRun> ExchangePlan::sends(std::int64_t rank) const {
  std::vector<ClassRun> runs;
  const Range ranks = neighbours(rank);
  for (std::int64_t to = ranks.begin; to < ranks.end; ++to) {
    std::int64_t end = 0;
    add_runs(rank, to, partial_rows(to, end), runs);
  }
  return runs;
}

std::vector<ClassRun> ExchangePlan::receives(std::int64_t rank) const {
  std::int64_t end = 0;
  const std::vector<ClassRows> rows = partial_rows(rank, end);
  std::vector<ClassRun> runs;
  const Range ranks = neighbours(rank);
  for (std::int64_t from = ranks.begin; from < ranks.end; ++from) {
    add_runs(from, rank, rows, runs);
  }
  return runs;
}

std::int64_t ExchangePlan::received_bytes(std::int64_t rank) const {
  std::int64_t rows = 0;
  for (const ClassRun& run : receives(rank)) {
    rows += run.from == rank ? 0 : run.count;
  }
  return 2 * rows * problem_.batch * problem_.head_dim * size_of(problem_.dtype);
}

bool ExchangePlan::has_partial_segments(std::int64_t rank) const {
  std::int64_t end = 0;
  for (const ClassRows& rows : partial_rows(rank, end)) {
    if (!rows.segments.empty() && !rows.columns.empty()) {
      return true;
    }
  }
  return false;
}

Reach ExchangePlan::reach() const {
  Reach reach = Reach::kLocal;
  for (std::int64_t rank = 0; rank < num_ranks(); ++rank) {
    if (!has_partial_segments(rank)) {
      continue;
    }
    const Range ranks = neighbours(rank);
    if (ranks.begin < rank - 1 || ranks.end > rank + 2) {
      return Reach::kFar;
    }
    reach = Reach::kNeighbours;
  }
  return reach;
}

namespace {

/// A hash of a list of integers (the finaliser of splitmix64 on every step).
class Hash {
 public:
  Hash& add(std::uint64_t value) {
    std::uint64_t z = state_ ^ (value + 0x9E3779B97F4A7C15u + (state_ << 6) + (state_ >> 2));
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    state_ = z ^ (z >> 31);
    return *this;
  }
  Hash& add(std::int64_t value) { return add(static_cast<std::uint64_t>(value)); }
  Hash& add(double value) { return add(std::bit_cast<std::uint64_t>(value)); }
  Hash& add(const std::vector<std::int64_t>& values) {
    add(static_cast<std::uint64_t>(values.size()));
    for (const std::int64_t value : values) {
      add(value);
    }
    return *this;
  }
  std::uint64_t value() const { return state_; }

 private:
  std::uint64_t state_ = 0;
};

}  // namespace

std::array<std::uint64_t, 4> ExchangePlan::hash() const {
  const Problem& p = problem_;
  Hash shapes;
  for (const std::int64_t value :
       {static_cast<std::int64_t>(p.device.kind), static_cast<std::int64_t>(p.dtype), p.batch,
        p.num_heads, p.num_kv_heads, p.head_dim, p.head_offset, p.all_heads()}) {
    shapes.add(value);
  }
  Hash branches;
  for (const Branch& branch : p.branches) {
    branches.add(branch.segment).add(branch.dilation).add(branch.offsets);
  }
  Hash options;
  options.add(p.scale.value_or(0.0)).add(p.out_scale).add(p.dropout_p);
  for (const std::int64_t value :
       {static_cast<std::int64_t>(p.merge), static_cast<std::int64_t>(p.tail),
        static_cast<std::int64_t>(p.scale.has_value()), static_cast<std::int64_t>(p.lse_grad),
        static_cast<std::int64_t>(p.is_causal), static_cast<std::int64_t>(p.has_seqused)}) {
    options.add(value);
  }
  return {shapes.value(), branches.value(), options.value(),
          Hash().add(begins_).add(p.cu_seqlens).value()};
}

std::string ExchangePlan::to_string() const {
  constexpr std::array<const char*, 3> kReaches = {"none: every segment lies inside one shard",
                                                   "to the next rank: segments cross one border",
                                                   "to all ranks of a segment"};
  std::string text = fmt::format("ranks         {}\nrows travel   {}\n", num_ranks(),
                                 kReaches.at(static_cast<std::size_t>(reach())));
  constexpr std::int64_t kShown = 8;
  for (std::int64_t rank = 0; rank < std::min(num_ranks(), kShown); ++rank) {
    std::vector<std::int64_t> rows(columns_.size(), 0);
    for (const ClassRun& run : receives(rank)) {
      rows[run.branch] += run.from == rank ? 0 : run.count;
    }
    text += fmt::format(
        "rank {:<8} rows [{}, {}), receives [{}] key rows of the branches, {} bytes\n", rank,
        shard(rank).begin, shard(rank).end, fmt::join(rows, ", "), received_bytes(rank));
  }
  if (num_ranks() > kShown) {
    text += fmt::format("              and {} ranks more\n", num_ranks() - kShown);
  }
  return text;
}

ExchangePlan make_exchange_plan(const Problem& problem, const std::vector<std::int64_t>& shards) {
  validate(problem);
  if (!problem.windows.empty()) {
    reject("windows", "none in an exchange plan", fmt::format("{}", problem.windows.size()),
           "the plan gives every rank its own");
  }
  if (problem.has_key_mask) {
    reject<Unsupported>("key_mask", "none over several ranks", "a mask",
                        "seqused says how much of every sequence is used");
  }
  if (shards.empty()) {
    reject("shards", "one number of rows per rank", "none");
  }
  ExchangePlan plan;
  plan.problem_ = problem;
  plan.begins_ = {0};
  for (std::size_t rank = 0; rank < shards.size(); ++rank) {
    if (shards[rank] < 0 || shards[rank] > problem.seqlen - plan.begins_.back()) {
      reject(fmt::format("shards[{}]", rank),
             fmt::format("0 <= rows <= {}, what is left of seqlen = {}",
                         problem.seqlen - plan.begins_.back(), problem.seqlen),
             fmt::format("{}", shards[rank]), "shards follow one another and cover the sequence");
    }
    plan.begins_.push_back(plan.begins_.back() + shards[rank]);
  }
  if (plan.begins_.back() != problem.seqlen) {
    reject("shards", fmt::format("{} rows together, seqlen", problem.seqlen),
           fmt::format("{}", plan.begins_.back()),
           "shards follow one another and cover the sequence");
  }
  for (const Branch& branch : problem.branches) {
    plan.columns_.push_back(class_columns(problem, branch));
  }
  return plan;
}

}  // namespace dilated
