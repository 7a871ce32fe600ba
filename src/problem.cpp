// Validation and printing of a Problem: the rules of semantics §2, each with its message.
#include "dilated/problem.h"

#include <cmath>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "dilated/error.h"

namespace dilated {
namespace {

constexpr std::int64_t kMaxSegment = std::int64_t{1} << 40;

[[noreturn]] void reject(std::string argument, std::string expected, std::string got,
                         std::string hint = "") {
  raise<InvalidProblem>({"dilated_attention", std::move(argument), std::move(expected),
                         std::move(got), std::move(hint)});
}

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
  const double elements = static_cast<double>(problem.batch) * static_cast<double>(problem.seqlen) *
                          static_cast<double>(problem.num_heads) *
                          static_cast<double>(problem.head_dim);
  if (elements > 0x1p60) {
    reject("query", "at most 2^60 elements", fmt::format("{:.3g}", elements));
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

}  // namespace

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

void validate(const Problem& problem) {
  validate_shapes(problem);
  validate_branches(problem);
  validate_cu_seqlens(problem);
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

std::string to_string(const Problem& problem) {
  std::string text = fmt::format(
      "device        {}\ndtype         {}\nbatch         {}\nseqlen        {}\nnum_heads     {}\n"
      "num_kv_heads  {}\nhead_dim      {}\n",
      name_of(problem.device), name_of(problem.dtype), problem.batch, problem.seqlen,
      problem.num_heads, problem.num_kv_heads, problem.head_dim);
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
  return text;
}

}  // namespace dilated
