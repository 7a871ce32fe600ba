// What a user may say before shapes are known: builder names, presets, overrides.
// `make_problem` turns it into a Problem; presets and offset builders live here and nowhere else.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "dilated/problem.h"

namespace dilated {

/// Options of one call as the user gave them; unset means "the preset's, else the default".
struct Options {
  std::vector<std::int64_t> segments = {};
  std::vector<std::int64_t> dilations = {};
  std::optional<std::string> preset = {};   // longnet | torchscale | head_groups | fork | fkodom
  std::optional<std::string> offsets = {};  // paper | torchscale | branch | zero
  // (branches, heads) row-major, instead of `offsets`
  std::optional<std::vector<std::int64_t>> offset_table = {};
  std::optional<std::string> groups = {};  // none | cumulative | literal
  std::optional<std::string> merge = {};   // lse | sum | mean
  std::optional<double> out_scale = {};
  std::optional<bool> lse_grad = {};
  std::optional<std::string> tail = {};        // mask | phantom
  std::optional<std::string> gqa_offset = {};  // kv | q
  bool is_causal = false;
  std::optional<double> scale = {};
  double dropout_p = 0.0;
  // Of a model whose heads are spread over ranks: builders see head h as head_offset + h of
  // total_heads (unset: the call's), and kv heads as parts of total_kv_heads (unset: as many query
  // heads per kv head as in the call).
  std::int64_t head_offset = 0;
  std::optional<std::int64_t> total_heads = {};
  std::optional<std::int64_t> total_kv_heads = {};
};

/// Shapes of one call.
struct Shapes {
  DeviceSpec device = {};
  DType dtype = DType::kFloat32;
  std::int64_t alignment = 0;
  std::int64_t batch = 1;
  std::int64_t seqlen = 0;
  std::int64_t num_heads = 1;
  std::int64_t num_kv_heads = 1;
  std::int64_t head_dim = 0;
  std::vector<std::int64_t> cu_seqlens = {};
  std::vector<Window> windows = {};
  KeyLayout key_layout = KeyLayout::kPositions;
  bool has_key_mask = false;
  bool has_seqused = false;
};

/// Resolves presets and builders, then validates. Throws InvalidProblem or Unsupported
/// (torchscale's row shift). For preset fkodom the column-sum division is not part of the result:
/// `uses_column_sums` says so and the caller composes it.
Problem make_problem(const Options& options, const Shapes& shapes);

/// True for preset fkodom: outputs of every branch are to be divided by their sums over positions.
bool uses_column_sums(const Options& options);

/// `offsets[h]` of every branch, row-major (branches, heads), for a builder of semantics §2.
std::vector<std::int64_t> build_offsets(const Options& options, std::int64_t num_heads,
                                        std::int64_t num_kv_heads);

/// Names that an option accepts: preset, offsets, groups, merge, tail or gqa_offset. Throws
/// InvalidProblem for another option.
std::vector<std::string_view> option_names(std::string_view option);

}  // namespace dilated
