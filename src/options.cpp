// Presets and offset builders (semantics §2 and §7): names in, a Problem out.
#include "dilated/options.h"

#include <algorithm>
#include <array>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "dilated/error.h"

#include "src/geometry.h"

namespace dilated {
namespace {

/// Defaults that a preset's name stands for. `per_branch`: out_scale is 1 / number of branches.
struct Preset {
  std::string_view name;
  std::string_view groups;
  std::string_view offsets;
  std::string_view merge;
  std::string_view tail;
  bool lse_grad;
  bool mean_over_branches;
  bool column_sums;
};

constexpr std::array<Preset, 5> kPresets = {{
    {"longnet", "none", "paper", "lse", "mask", true, false, false},
    {"torchscale", "none", "torchscale", "lse", "phantom", false, false, false},
    {"head_groups", "cumulative", "branch", "sum", "mask", true, false, false},
    {"fork", "cumulative", "branch", "sum", "mask", true, true, false},
    {"fkodom", "literal", "branch", "sum", "mask", true, true, true},
}};

/// Without a preset every option has longnet's default.
const Preset& preset_of(const Options& options) {
  if (!options.preset) {
    return kPresets[0];
  }
  for (const Preset& preset : kPresets) {
    if (preset.name == *options.preset) {
      return preset;
    }
  }
  reject("preset", fmt::format("one of {}", fmt::join(option_names("preset"), ", ")),
         *options.preset);
}

enum class Groups { kNone, kCumulative, kLiteral };
enum class Rule { kPaper, kTorchscale, kBranch, kZero };

/// What an option's names mean.
template <typename Value, std::size_t kCount>
using Choices = std::array<std::pair<std::string_view, Value>, kCount>;

constexpr Choices<Rule, 4> kRules = {{{"paper", Rule::kPaper},
                                      {"torchscale", Rule::kTorchscale},
                                      {"branch", Rule::kBranch},
                                      {"zero", Rule::kZero}}};
constexpr Choices<Groups, 3> kGroups = {
    {{"none", Groups::kNone}, {"cumulative", Groups::kCumulative}, {"literal", Groups::kLiteral}}};
constexpr Choices<Merge, 3> kMerges = {
    {{"lse", Merge::kLse}, {"sum", Merge::kSum}, {"mean", Merge::kMean}}};
constexpr Choices<Tail, 2> kTails = {{{"mask", Tail::kMask}, {"phantom", Tail::kPhantom}}};
/// Whether builders see the key/value head.
constexpr Choices<bool, 2> kGqaOffsets = {{{"kv", true}, {"q", false}}};

template <typename Value, std::size_t kCount>
std::vector<std::string_view> names_of(const Choices<Value, kCount>& choices) {
  std::vector<std::string_view> names;
  for (const auto& choice : choices) {
    names.push_back(choice.first);
  }
  return names;
}

template <typename Value, std::size_t kCount>
Value parse(const char* argument, std::string_view given, const Choices<Value, kCount>& choices) {
  for (const auto& [name, value] : choices) {
    if (name == given) {
      return value;
    }
  }
  reject(argument, fmt::format("one of {}", fmt::join(names_of(choices), ", ")),
         std::string(given));
}

std::string_view given_or(const std::optional<std::string>& given, std::string_view otherwise) {
  return given ? std::string_view(*given) : otherwise;
}

/// Heads of group b: sizes floor(H/B) + [b < H mod B]; literal is fkodom's [b g_b, (b+1) g_b).
Range group_range(Groups groups, std::int64_t b, std::int64_t num_branches,
                  std::int64_t num_heads) {
  if (groups == Groups::kNone) {
    return {0, num_heads};
  }
  const std::int64_t base = num_heads / num_branches;
  const std::int64_t extra = num_heads % num_branches;
  const std::int64_t size = base + (b < extra ? 1 : 0);
  const std::int64_t begin = groups == Groups::kLiteral ? b * size : b * base + std::min(b, extra);
  return {begin, std::min(num_heads, begin + size)};
}

std::int64_t residue(Rule rule, std::int64_t b, std::int64_t head, std::int64_t num_heads,
                     std::int64_t dilation) {
  switch (rule) {
    case Rule::kPaper:
      return head % dilation;
    case Rule::kTorchscale:
      return head / ceil_div(num_heads, dilation);
    case Rule::kBranch:
      return b % dilation;
    case Rule::kZero:
      return 0;
  }
  return 0;
}

/// The heads of the whole model, of which a call may hold a part.
struct Heads {
  std::int64_t total;
  std::int64_t per_kv;  // query heads per kv head
};

/// Head counts that `validate` refuses are not reported here.
Heads heads_of(const Options& options, std::int64_t num_heads, std::int64_t num_kv_heads) {
  const std::int64_t total = options.total_heads.value_or(num_heads);
  if (options.head_offset < 0 || options.head_offset > total - num_heads) {
    reject("head_offset",
           fmt::format("0 <= head_offset <= total_heads - num_heads = {}", total - num_heads),
           fmt::format("{}", options.head_offset),
           "the call's heads are [head_offset, head_offset + num_heads) of total_heads");
  }
  if (!options.total_kv_heads) {
    const std::int64_t per_kv =
        num_kv_heads > 0 ? std::max<std::int64_t>(1, num_heads / num_kv_heads) : 1;
    return {total, per_kv};
  }
  if (*options.total_kv_heads < 1 || total % *options.total_kv_heads != 0) {
    reject("total_kv_heads", fmt::format("a divisor of total_heads = {}", total),
           fmt::format("{}", *options.total_kv_heads));
  }
  return {total, total / *options.total_kv_heads};
}

void check_lists(const Options& options) {
  if (options.segments.empty()) {
    reject("segments", "at least one branch", "none");
  }
  if (options.segments.size() != options.dilations.size()) {
    reject("dilations", fmt::format("as many entries as segments, {}", options.segments.size()),
           fmt::format("{}", options.dilations.size()));
  }
  for (std::size_t b = 0; b < options.dilations.size(); ++b) {
    if (options.dilations[b] < 1) {
      reject(fmt::format("dilations[{}]", b), "1 <= dilation <= 2^40",
             fmt::format("{}", options.dilations[b]));
    }
  }
}

/// merge, out_scale and groups are what a preset is: naming both is a contradiction.
void check_overrides(const Options& options) {
  if (!options.preset) {
    return;
  }
  const std::string hint =
      fmt::format("preset '{}' fixes it; leave out preset, or override offsets, tail or lse_grad",
                  *options.preset);
  if (options.merge) {
    reject("merge", "no value together with preset", *options.merge, hint);
  }
  if (options.out_scale) {
    reject("out_scale", "no value together with preset", fmt::format("{}", *options.out_scale),
           hint);
  }
  if (options.groups) {
    reject("groups", "no value together with preset", *options.groups, hint);
  }
}

/// Upstream torchscale shifts the rows of later segments when the dilation does not divide the
/// segment.
void check_row_shift(const Options& options, const Shapes& shapes) {
  if (!options.preset || *options.preset != "torchscale") {
    return;
  }
  std::int64_t longest = shapes.cu_seqlens.empty() ? shapes.seqlen : 0;
  for (std::size_t s = 1; s < shapes.cu_seqlens.size(); ++s) {
    longest = std::max(longest, shapes.cu_seqlens[s] - shapes.cu_seqlens[s - 1]);
  }
  for (std::size_t b = 0; b < options.segments.size(); ++b) {
    const std::int64_t w = options.segments[b];
    const std::int64_t r = options.dilations[b];
    if (w >= 1 && w % r != 0 && longest > w) {
      raise<Unsupported>(
          {"dilated_attention", "preset",
           "a dilation that divides its segment wherever a sequence is longer than the segment",
           fmt::format("segments[{0}] = {1}, dilations[{0}] = {2}, sequence length {3}", b, w, r,
                       longest),
           "torchscale shifts the rows of later segments there: leave out preset to compute the "
           "unshifted operator, or pass row_shift=True for weights trained that way"});
    }
  }
}

}  // namespace

std::vector<std::string_view> option_names(std::string_view option) {
  if (option == "preset") {
    std::vector<std::string_view> names;
    names.reserve(std::size(kPresets));
    for (const Preset& preset : kPresets) {
      names.push_back(preset.name);
    }
    return names;
  }
  if (option == "offsets") {
    return names_of(kRules);
  }
  if (option == "groups") {
    return names_of(kGroups);
  }
  if (option == "merge") {
    return names_of(kMerges);
  }
  if (option == "tail") {
    return names_of(kTails);
  }
  if (option == "gqa_offset") {
    return names_of(kGqaOffsets);
  }
  reject("option", "preset, offsets, groups, merge, tail or gqa_offset", std::string(option));
}

bool uses_column_sums(const Options& options) { return preset_of(options).column_sums; }

std::vector<std::int64_t> build_offsets(const Options& options, std::int64_t num_heads,
                                        std::int64_t num_kv_heads) {
  check_lists(options);
  const Preset& preset = preset_of(options);
  const auto num_branches = static_cast<std::int64_t>(options.segments.size());
  const Groups groups = parse("groups", given_or(options.groups, preset.groups), kGroups);
  const bool has_table = options.offset_table.has_value();
  if (has_table && options.offsets) {
    reject("offsets", "a builder's name or a table", "both");
  }
  if (has_table &&
      static_cast<std::int64_t>(options.offset_table->size()) != num_branches * num_heads) {
    reject("offsets", fmt::format("a table of {} branches x {} heads", num_branches, num_heads),
           fmt::format("{} entries", options.offset_table->size()));
  }
  if (has_table && options.gqa_offset) {
    reject("gqa_offset", "no value together with a table of offsets", *options.gqa_offset,
           "a table is per query head already");
  }
  const Rule rule = parse("offsets", given_or(options.offsets, preset.offsets), kRules);
  const bool by_kv_head = parse("gqa_offset", given_or(options.gqa_offset, "kv"), kGqaOffsets);
  const Heads heads = heads_of(options, num_heads, num_kv_heads);
  const std::int64_t group = by_kv_head ? heads.per_kv : 1;
  std::vector<std::int64_t> offsets;
  for (std::int64_t b = 0; b < num_branches; ++b) {
    const Range range = group_range(groups, b, num_branches, heads.total);
    for (std::int64_t h = 0; h < num_heads; ++h) {
      const std::int64_t head = options.head_offset + h;
      if (!range.contains(head)) {
        offsets.push_back(-1);
      } else if (has_table) {
        offsets.push_back((*options.offset_table)[static_cast<std::size_t>(b * num_heads + h)]);
      } else {
        offsets.push_back(residue(rule, b, head / group, heads.total / group,
                                  options.dilations[static_cast<std::size_t>(b)]));
      }
    }
  }
  return offsets;
}

Problem make_problem(const Options& options, const Shapes& shapes) {
  check_lists(options);
  check_overrides(options);
  const Preset& preset = preset_of(options);
  const auto num_branches = options.segments.size();
  if (preset.column_sums && !shapes.cu_seqlens.empty()) {
    raise<Unsupported>({"dilated_attention", "cu_seqlens", "none with preset 'fkodom'",
                        fmt::format("{} sequences", shapes.cu_seqlens.size() - 1),
                        "its column sums run over one sequence; call once per sequence"});
  }
  const std::int64_t total_heads = options.total_heads.value_or(shapes.num_heads);
  if (preset.name == "fork" && total_heads < static_cast<std::int64_t>(num_branches)) {
    reject("num_heads", fmt::format(">= number of branches = {} with preset 'fork'", num_branches),
           fmt::format("{}", total_heads));
  }
  Problem problem;
  problem.device = shapes.device;
  problem.dtype = shapes.dtype;
  problem.alignment = shapes.alignment;
  problem.batch = shapes.batch;
  problem.seqlen = shapes.seqlen;
  problem.num_heads = shapes.num_heads;
  problem.num_kv_heads = shapes.num_kv_heads;
  problem.head_dim = shapes.head_dim;
  problem.head_offset = options.head_offset;
  problem.total_heads = options.total_heads.value_or(0);
  problem.merge = parse("merge", given_or(options.merge, preset.merge), kMerges);
  problem.out_scale = options.out_scale.value_or(
      preset.mean_over_branches ? 1.0 / static_cast<double>(num_branches) : 1.0);
  problem.lse_grad = options.lse_grad.value_or(preset.lse_grad);
  problem.tail = parse("tail", given_or(options.tail, preset.tail), kTails);
  problem.is_causal = options.is_causal;
  problem.scale = options.scale;
  problem.dropout_p = options.dropout_p;
  problem.cu_seqlens = shapes.cu_seqlens;
  problem.windows = shapes.windows;
  problem.key_layout = shapes.key_layout;
  problem.has_key_mask = shapes.has_key_mask;
  problem.has_seqused = shapes.has_seqused;
  const std::vector<std::int64_t> offsets =
      build_offsets(options, shapes.num_heads, shapes.num_kv_heads);
  for (std::size_t b = 0; b < num_branches; ++b) {
    const auto begin = offsets.begin() + static_cast<std::ptrdiff_t>(b) * shapes.num_heads;
    problem.branches.push_back(
        {options.segments[b], options.dilations[b], {begin, begin + shapes.num_heads}});
  }
  validate(problem);
  check_row_shift(options, shapes);
  return problem;
}

}  // namespace dilated
