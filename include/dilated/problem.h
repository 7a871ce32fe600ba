// What is asked: a plain value that names every parameter of one call and no memory.
// Flow: Options + shapes -> Problem -> make_plan -> Plan -> forward / backward.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "dilated/range.h"
#include "dilated/tensor_view.h"

namespace dilated {

/// How the branches that cover a row combine: softmax over all of them, their sum, their mean.
enum class Merge { kLse, kSum, kMean };
/// What lies beyond the end of the last segment: nothing, or zero keys with zero values.
enum class Tail { kMask, kPhantom };

/// Where the keys of a call lie.
enum class KeyLayout {
  kPositions,  // key and value hold the windows' keys
  // Query and key windows are one shard of the sequence; key and value hold its keys. The keys of
  // segments that it holds only in part come as class rows (class_rows.h), those of other shards
  // included: every query sees all its keys.
  kClassRows,
};

std::string_view name_of(Merge merge);
std::string_view name_of(Tail tail);
std::string_view name_of(KeyLayout layout);

/// One (segment, dilation) pair. `offsets[h]` is the residue that query head h keeps; with -1 it
/// takes no part in the branch.
struct Branch {
  std::int64_t segment = 0;
  std::int64_t dilation = 0;
  std::vector<std::int64_t> offsets = {};

  bool operator==(const Branch&) const = default;
};

/// The device that a call runs on, as far as decisions depend on it.
struct DeviceSpec {
  Device kind = Device::kCpu;
  std::int64_t index = 0;
  std::int64_t capability = 0;  // CUDA: 10 * major + minor
  // CUDA: multiprocessors. CPU: threads that a call uses at most; 0: as many as the hardware has.
  std::int64_t units = 0;

  bool operator==(const DeviceSpec&) const = default;
};

/// Part of one sequence: the positions whose query rows and whose key rows a call holds.
struct Window {
  Range queries;
  Range keys;

  bool operator==(const Window&) const = default;
};

/// One call, shapes and options; tensors come later. Compares, prints (`to_string`) and copies.
struct Problem {
  DeviceSpec device = {};
  DType dtype = DType::kFloat32;
  // A power of two that divides, in bytes, all pointers and all strides but that of head_dim.
  // 0: unknown, the size of an element.
  std::int64_t alignment = 0;
  std::int64_t batch = 1;   // 1 when packed
  std::int64_t seqlen = 0;  // total number of positions when packed
  std::int64_t num_heads = 1;
  std::int64_t num_kv_heads = 1;
  std::int64_t head_dim = 0;
  // The heads are [head_offset, head_offset + num_heads) of total_heads (0: num_heads) of a model
  // whose heads are spread over ranks. Dropout is drawn for these numbers.
  std::int64_t head_offset = 0;
  std::int64_t total_heads = 0;

  std::vector<Branch> branches = {};
  Merge merge = Merge::kLse;
  double out_scale = 1.0;
  bool lse_grad = true;
  Tail tail = Tail::kMask;
  bool is_causal = false;
  std::optional<double> scale = {};  // nullopt: head_dim^-1/2
  double dropout_p = 0.0;

  // Empty: not packed; else 0 = c[0] <= c[1] <= ... = seqlen.
  std::vector<std::int64_t> cu_seqlens = {};
  // Empty: every sequence is whole. Else one window per sequence: tensors hold these rows only.
  // Everything keeps its meaning in positions of the sequence (semantics §3).
  std::vector<Window> windows = {};
  KeyLayout key_layout = KeyLayout::kPositions;
  bool has_key_mask = false;
  bool has_seqused = false;

  /// Query head h reads key/value head h / heads_per_kv_head(). For a legal problem with heads.
  std::int64_t heads_per_kv_head() const { return num_heads / num_kv_heads; }
  /// total_heads, resolved.
  std::int64_t all_heads() const { return total_heads == 0 ? num_heads : total_heads; }
  /// Sequences: the batch, or the intervals of cu_seqlens.
  std::int64_t num_sequences() const;
  /// Rows of the query tensor, and of key and value, per batch element.
  std::int64_t query_rows() const;
  std::int64_t key_rows() const;

  bool operator==(const Problem&) const = default;
};

/// Throws InvalidProblem, naming argument, value and rule, unless `problem` is legal, that is,
/// obeys semantics §2.
void validate(const Problem& problem);

/// One line per field.
std::string to_string(const Problem& problem);

/// Query-key pairs that the mathematics needs, summed over batch and heads, without masks
/// (semantics §10). One count per branch. Throws InvalidProblem for 2^63 pairs and more.
std::vector<std::int64_t> count_pairs(const Problem& problem);

/// Row-major (seqlen, seqlen) table for query head `head` of an unpacked problem without windows:
/// entry [p][j] is the number of branches in which query p sees key j. Throws InvalidProblem for
/// seqlen > 4096 or head out of range.
std::vector<std::int32_t> attention_pattern(const Problem& problem, std::int64_t head);

}  // namespace dilated
