// Validation and printing of a Problem: the rules of semantics §2, each with its message.
#include "dilated/problem.h"

#include <algorithm>
#include <cmath>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "dilated/error.h"

namespace dilated {
namespace {

constexpr std::int64_t kMaxSegment = std::int64_t{1} << 40;
/// More than any address space: products of extents below it stay far from overflow.
constexpr double kMaxBytes = 0x1p50;
constexpr std::int64_t kMaxUnits = std::int64_t{1} << 20;

void require_at_least(const char* argument, std::int64_t value, std::int64_t minimum) {
  if (value < minimum) {
    reject(argument, fmt::format(">= {}", minimum), fmt::format("{}", value));
  }
}

void require_finite(const char* argument, double value) {
  if (!std::isfinite(value)) {
    reject(argument, "a finite number", fmt::format("{}", value));
  }
}

void validate_shapes(const Problem& problem) {
  require_at_least("batch", problem.batch, 0);
  require_at_least("seqlen", problem.seqlen, 0);
  require_at_least("num_heads", problem.num_heads, 0);
  require_at_least("num_kv_heads", problem.num_kv_heads, 0);
  require_at_least("head_dim", problem.head_dim, 1);
  if (problem.num_heads > 0 &&
      (problem.num_kv_heads == 0 || problem.num_heads % problem.num_kv_heads != 0)) {
    reject("num_kv_heads", fmt::format("a divisor of num_heads = {}", problem.num_heads),
           fmt::format("{}", problem.num_kv_heads),
           "query head h reads key/value head h / (num_heads / num_kv_heads)");
  }
  if (problem.head_offset < 0 || problem.head_offset > problem.all_heads() - problem.num_heads) {
    reject("head_offset",
           fmt::format("0 <= head_offset <= total_heads - num_heads = {}",
                       problem.all_heads() - problem.num_heads),
           fmt::format("{}", problem.head_offset),
           "the call's heads are [head_offset, head_offset + num_heads) of total_heads");
  }
  // Empty dimensions count as 1: the others enter sums and products of their own.
  double bytes = static_cast<double>(size_of(problem.dtype));
  for (const std::int64_t extent :
       {problem.batch, problem.seqlen, std::max(problem.num_heads, problem.num_kv_heads),
        problem.head_dim}) {
    bytes *= static_cast<double>(std::max<std::int64_t>(extent, 1));
  }
  if (bytes > kMaxBytes) {
    reject("query", "at most 2^50 bytes", fmt::format("{:.3g}", bytes),
           "no memory could hold the tensors");
  }
}

void validate_device(const Problem& problem) {
  const DeviceSpec& device = problem.device;
  require_at_least("device.index", device.index, 0);
  require_at_least("device.capability", device.capability, 0);
  if (device.units < 0 || device.units > kMaxUnits) {
    reject("device.units", "0 <= units <= 2^20 threads or multiprocessors",
           fmt::format("{}", device.units), "0: as many as the hardware has");
  }
  if (problem.alignment < 0 || (problem.alignment & (problem.alignment - 1)) != 0) {
    reject("alignment", "0 (unknown) or a power of two", fmt::format("{}", problem.alignment));
  }
}

void validate_branches(const Problem& problem) {
  if (problem.branches.empty()) {
    reject("segments", "at least one branch", "none");
  }
  for (std::size_t b = 0; b < problem.branches.size(); ++b) {
    const Branch& branch = problem.branches[b];
    if (branch.segment < 1 || branch.segment > kMaxSegment) {
      reject(fmt::format("segments[{}]", b), "1 <= segment <= 2^40",
             fmt::format("{}", branch.segment), "a segment longer than the sequence acts as one");
    }
    if (branch.dilation < 1 || branch.dilation > kMaxSegment) {
      reject(fmt::format("dilations[{}]", b), "1 <= dilation <= 2^40",
             fmt::format("{}", branch.dilation));
    }
    if (static_cast<std::int64_t>(branch.offsets.size()) != problem.num_heads) {
      reject(fmt::format("offsets[{}]", b),
             fmt::format("one entry per query head, {}", problem.num_heads),
             fmt::format("{}", branch.offsets.size()));
    }
    for (std::size_t h = 0; h < branch.offsets.size(); ++h) {
      if (branch.offsets[h] < -1) {
        reject(fmt::format("offsets[{}][{}]", b, h), ">= -1", fmt::format("{}", branch.offsets[h]),
               "-1 leaves the head out");
      }
      if (branch.offsets[h] >= branch.dilation) {
        reject(fmt::format("offsets[{}][{}]", b, h),
               fmt::format("< dilations[{}] = {}", b, branch.dilation),
               fmt::format("{}", branch.offsets[h]), "-1 leaves the head out");
      }
    }
  }
}

void validate_cu_seqlens(const Problem& problem) {
  const std::vector<std::int64_t>& cu = problem.cu_seqlens;
  if (cu.empty()) {
    return;
  }
  if (problem.batch != 1) {
    reject("query", "batch 1 with cu_seqlens", fmt::format("{}", problem.batch),
           "packed tensors have shape (total, heads, head_dim)");
  }
  if (cu.front() != 0) {
    reject("cu_seqlens[0]", "0", fmt::format("{}", cu.front()));
  }
  for (std::size_t i = 1; i < cu.size(); ++i) {
    if (cu[i] < cu[i - 1]) {
      reject(fmt::format("cu_seqlens[{}]", i),
             fmt::format(">= cu_seqlens[{}] = {}", i - 1, cu[i - 1]), fmt::format("{}", cu[i]),
             "equal neighbours are an empty sequence");
    }
  }
  if (cu.back() != problem.seqlen) {
    reject(fmt::format("cu_seqlens[{}]", cu.size() - 1),
           fmt::format("the number of tokens, {}", problem.seqlen), fmt::format("{}", cu.back()));
  }
}

void validate_range(const std::string& name, const Range& range, std::int64_t length) {
  if (range.begin < 0 || range.begin > range.end || range.end > length) {
    reject(name, fmt::format("0 <= begin <= end <= sequence length {}", length),
           fmt::format("[{}, {})", range.begin, range.end));
  }
}

void validate_windows(const Problem& problem) {
  const std::vector<Window>& windows = problem.windows;
  const bool class_rows = problem.key_layout == KeyLayout::kClassRows;
  if (windows.empty() && !class_rows) {
    return;
  }
  if (static_cast<std::int64_t>(windows.size()) != problem.num_sequences()) {
    reject("windows", fmt::format("one per sequence, {}", problem.num_sequences()),
           fmt::format("{}", windows.size()));
  }
  const bool packed = !problem.cu_seqlens.empty();
  for (std::size_t s = 0; s < windows.size(); ++s) {
    const std::int64_t length =
        packed ? problem.cu_seqlens[s + 1] - problem.cu_seqlens[s] : problem.seqlen;
    validate_range(fmt::format("windows[{}].queries", s), windows[s].queries, length);
    validate_range(fmt::format("windows[{}].keys", s), windows[s].keys, length);
    if (!packed && (windows[s].queries.size() != windows[0].queries.size() ||
                    windows[s].keys.size() != windows[0].keys.size())) {
      reject(
          fmt::format("windows[{}]", s), "as many rows as windows[0], unless packed",
          fmt::format("{} queries and {} keys", windows[s].queries.size(), windows[s].keys.size()));
    }
  }
  for (std::size_t s = 0; s < windows.size() && class_rows; ++s) {
    if (windows[s].queries != windows[s].keys) {
      reject(fmt::format("windows[{}].keys", s),
             fmt::format("those of the queries, [{}, {}), with class rows",
                         windows[s].queries.begin, windows[s].queries.end),
             fmt::format("[{}, {})", windows[s].keys.begin, windows[s].keys.end),
             "a shard holds both");
    }
  }
  if (class_rows && problem.has_key_mask) {
    reject<Unsupported>("key_mask", "none with class rows", "a mask",
                        "it would have to hold the keys of other shards");
  }
  if (problem.merge != Merge::kLse && !class_rows) {
    reject<Unsupported>("merge", "lse with windows", std::string(name_of(problem.merge)),
                        "results of windows are merged by their log-sum-exps, which say nothing "
                        "about the single branches");
  }
}

std::int64_t rows_of(const Problem& problem, Range Window::* side) {
  if (problem.windows.empty()) {
    return problem.seqlen;
  }
  if (problem.cu_seqlens.empty()) {
    return (problem.windows.front().*side).size();
  }
  std::int64_t rows = 0;
  for (const Window& window : problem.windows) {
    rows += (window.*side).size();
  }
  return rows;
}

}  // namespace

std::int64_t Problem::num_sequences() const {
  return cu_seqlens.empty() ? batch : static_cast<std::int64_t>(cu_seqlens.size()) - 1;
}

std::int64_t Problem::query_rows() const { return rows_of(*this, &Window::queries); }

std::int64_t Problem::key_rows() const { return rows_of(*this, &Window::keys); }

std::string_view name_of(Merge merge) {
  switch (merge) {
    case Merge::kLse:
      return "lse";
    case Merge::kSum:
      return "sum";
    case Merge::kMean:
      return "mean";
  }
  return "unknown";
}

std::string_view name_of(Tail tail) { return tail == Tail::kMask ? "mask" : "phantom"; }

std::string_view name_of(KeyLayout layout) {
  return layout == KeyLayout::kPositions ? "positions" : "class rows";
}

void validate(const Problem& problem) {
  validate_device(problem);
  validate_shapes(problem);
  validate_branches(problem);
  validate_cu_seqlens(problem);
  validate_windows(problem);
  require_finite("out_scale", problem.out_scale);
  if (problem.scale) {
    require_finite("scale", *problem.scale);
  }
  if (!(problem.dropout_p >= 0.0 && problem.dropout_p <= 1.0)) {
    reject("dropout_p", "0 <= dropout_p <= 1", fmt::format("{}", problem.dropout_p));
  }
  if (!problem.lse_grad && problem.merge != Merge::kLse) {
    reject("lse_grad", fmt::format("true with merge = {}", name_of(problem.merge)), "false",
           "only merge = lse has weights to detach");
  }
}

namespace {

std::string text_of(const DeviceSpec& device) {
  std::string text(name_of(device.kind));
  if (device.kind == Device::kCuda) {
    text += fmt::format(":{}, capability {}.{}", device.index, device.capability / 10,
                        device.capability % 10);
  }
  if (device.units > 0) {
    text += fmt::format(", {} {}", device.units,
                        device.kind == Device::kCuda ? "multiprocessors" : "threads");
  }
  return text;
}

}  // namespace

std::string to_string(const Problem& problem) {
  std::string text = fmt::format(
      "device        {}\ndtype         {}\nalignment     {}\nbatch         {}\nseqlen        {}\n"
      "num_heads     {}\nnum_kv_heads  {}\nhead_dim      {}\n",
      text_of(problem.device), name_of(problem.dtype),
      problem.alignment == 0 ? std::string("unknown") : fmt::format("{} bytes", problem.alignment),
      problem.batch, problem.seqlen, problem.num_heads, problem.num_kv_heads, problem.head_dim);
  if (problem.total_heads != 0) {
    text += fmt::format("heads         {} to {} of {}\n", problem.head_offset,
                        problem.head_offset + problem.num_heads - 1, problem.total_heads);
  }
  for (std::size_t b = 0; b < problem.branches.size(); ++b) {
    const Branch& branch = problem.branches[b];
    text += fmt::format("branch {:<6} segment {}, dilation {}, offsets [{}]\n", b, branch.segment,
                        branch.dilation, fmt::join(branch.offsets, ", "));
  }
  text += fmt::format(
      "merge         {}\nout_scale     {}\nlse_grad      {}\ntail          {}\nis_causal     {}\n"
      "scale         {}\ndropout_p     {}\ncu_seqlens    {}\nkey_mask      {}\nseqused       {}\n",
      name_of(problem.merge), problem.out_scale, problem.lse_grad, name_of(problem.tail),
      problem.is_causal,
      problem.scale ? fmt::format("{}", *problem.scale) : std::string("head_dim^-1/2"),
      problem.dropout_p,
      problem.cu_seqlens.empty() ? std::string("none")
                                 : fmt::format("{} sequences", problem.cu_seqlens.size() - 1),
      problem.has_key_mask, problem.has_seqused);
  for (std::size_t w = 0; w < std::min<std::size_t>(problem.windows.size(), 8); ++w) {
    const Window& window = problem.windows[w];
    text += fmt::format("window {:<6} queries [{}, {}), keys [{}, {})\n", w, window.queries.begin,
                        window.queries.end, window.keys.begin, window.keys.end);
  }
  if (problem.windows.size() > 8) {
    text += fmt::format("              and {} windows more\n", problem.windows.size() - 8);
  }
  if (problem.key_layout != KeyLayout::kPositions) {
    text += fmt::format("keys          by {}\n", name_of(problem.key_layout));
  }
  return text;
}

}  // namespace dilated
