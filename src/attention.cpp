// forward and backward: check the views against the plan, provide scratch, call the back end.
#include "dilated/attention.h"

#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "dilated/error.h"

#include "src/backend_table.h"

namespace dilated {
namespace {

constexpr std::size_t kAlignment = 64;

/// Compares the views of one call with its plan; every mismatch names the tensor.
class ViewCheck {
 public:
  ViewCheck(const char* op, const Problem& problem) : op_(op), problem_(problem) {}

  /// (batch, seqlen, heads, head_dim) of the problem's dtype.
  template <typename Void>
  void tokens(const char* name, const StridedView<Void, 4>& view, std::int64_t heads) const {
    tensor(name, view, {problem_.batch, problem_.seqlen, heads, problem_.head_dim}, problem_.dtype);
    last_dimension(name, view);
  }

  /// (batch, num_heads, rows, head_dim), float32 or float64.
  template <typename Void>
  void branch_rows(const char* name, const StridedView<Void, 4>& view, std::int64_t rows) const {
    tensor(name, view, {problem_.batch, problem_.num_heads, rows, problem_.head_dim}, lse_dtype());
    last_dimension(name, view);
  }

  /// (batch, num_heads, rows), float32 or float64.
  template <typename Void>
  void rows(const char* name, const StridedView<Void, 3>& view, std::int64_t rows) const {
    tensor(name, view, {problem_.batch, problem_.num_heads, rows}, lse_dtype());
  }

  void masks(const Masks& masks) const {
    if (problem_.has_key_mask) {
      tensor("key_mask", masks.key_mask, {problem_.batch, problem_.seqlen}, masks.key_mask.dtype);
    } else if (masks.key_mask.defined()) {
      fail("key_mask", "none, as the problem has no key mask", "a tensor");
    }
    const bool has_sequences = problem_.batch > 0;
    if (problem_.has_seqused != (masks.seqused != nullptr) && has_sequences) {
      fail("seqused",
           problem_.has_seqused ? "one length per sequence" : "none, as the problem has no seqused",
           problem_.has_seqused ? "none" : "lengths");
    }
  }

  [[noreturn]] void fail(const char* name, std::string expected, std::string got,
                         std::string hint = "") const {
    raise<InvalidProblem>({op_, name, std::move(expected), std::move(got), std::move(hint)});
  }

 private:
  DType lse_dtype() const {
    return problem_.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  }

  template <typename Void, std::size_t kRank>
  void tensor(const char* name, const StridedView<Void, kRank>& view,
              const std::array<std::int64_t, kRank>& shape, DType dtype) const {
    bool empty = false;
    for (const std::int64_t extent : shape) {
      empty = empty || extent == 0;
    }
    if (!view.defined() && !empty) {
      fail(name, fmt::format("a tensor of shape ({})", fmt::join(shape, ", ")), "none");
    }
    if (empty && !view.defined()) {
      return;
    }
    if (view.shape != shape) {
      fail(name, fmt::format("shape ({})", fmt::join(shape, ", ")),
           fmt::format("({})", fmt::join(view.shape, ", ")));
    }
    if (view.dtype != dtype) {
      fail(name, fmt::format("dtype {}", name_of(dtype)), std::string(name_of(view.dtype)));
    }
  }

  template <typename Void>
  void last_dimension(const char* name, const StridedView<Void, 4>& view) const {
    if (view.defined() && view.shape[3] > 1 && view.strides[3] != 1) {
      fail(name, "a contiguous last dimension", fmt::format("stride {}", view.strides[3]),
           "call .contiguous()");
    }
  }

  const char* op_;
  const Problem& problem_;
};

struct FreeAligned {
  void operator()(std::byte* memory) const {
    ::operator delete[](memory, std::align_val_t{kAlignment});
  }
};

/// The call's context with threads and a large enough, aligned workspace filled in.
class Scratch {
 public:
  Scratch(const ViewCheck& check, const Plan& plan, Pass pass, const Context& context)
      : context_(context) {
    if (context_.parallel_for == nullptr) {
      context_.parallel_for = &default_parallel_for();
    }
    const std::int64_t bytes = plan.workspace_bytes(pass, context_.parallel_for->num_threads());
    const auto needed = static_cast<std::size_t>(bytes);
    if (context_.workspace.empty()) {
      owned_.reset(new (std::align_val_t{kAlignment}) std::byte[needed]);
      context_.workspace = {owned_.get(), needed};
      return;
    }
    if (context_.workspace.size() < needed) {
      check.fail("workspace", fmt::format("at least {} bytes", bytes),
                 fmt::format("{}", context_.workspace.size()),
                 "plan.workspace_bytes() tells the size");
    }
    if (reinterpret_cast<std::uintptr_t>(context_.workspace.data()) % kAlignment != 0) {
      check.fail("workspace", fmt::format("{}-byte alignment", kAlignment),
                 fmt::format("{}", static_cast<const void*>(context_.workspace.data())));
    }
  }

  const Context& context() const { return context_; }

 private:
  Context context_;
  std::unique_ptr<std::byte[], FreeAligned> owned_;
};

void fill_zero(const TensorView& view) {
  const auto bytes = static_cast<std::size_t>(view.shape[3] * size_of(view.dtype));
  for (std::int64_t i = 0; i < view.shape[0]; ++i) {
    for (std::int64_t j = 0; j < view.shape[1]; ++j) {
      for (std::int64_t k = 0; k < view.shape[2]; ++k) {
        const std::int64_t offset = i * view.strides[0] + j * view.strides[1] + k * view.strides[2];
        std::memset(static_cast<std::byte*>(view.data) + offset * size_of(view.dtype), 0, bytes);
      }
    }
  }
}

bool has_rows(const Problem& problem) {
  return problem.batch > 0 && problem.seqlen > 0 && problem.num_heads > 0;
}

}  // namespace

void forward(const Plan& plan, const ForwardTensors& tensors, const Context& context) {
  const Problem& problem = plan.problem();
  const ViewCheck check("forward", problem);
  check.tokens("query", tensors.query, problem.num_heads);
  check.tokens("key", tensors.key, problem.num_kv_heads);
  check.tokens("value", tensors.value, problem.num_kv_heads);
  check.tokens("out", tensors.out, problem.num_heads);
  check.rows("lse", tensors.lse, problem.seqlen);
  check.masks(tensors.masks);
  if (tensors.branch_out.defined() || tensors.branch_lse.defined()) {
    check.branch_rows("branch_out", tensors.branch_out, plan.branch_rows());
    check.rows("branch_lse", tensors.branch_lse, plan.branch_rows());
  }
  if (has_rows(problem)) {
    const Scratch scratch(check, plan, Pass::kForward, context);
    plan.backend().forward(plan, tensors, scratch.context());
  }
}

void backward(const Plan& plan, const BackwardTensors& tensors, const Context& context) {
  const Problem& problem = plan.problem();
  const ViewCheck check("backward", problem);
  check.tokens("dout", tensors.dout, problem.num_heads);
  if (tensors.dlse.defined()) {
    check.rows("dlse", tensors.dlse, problem.seqlen);
  }
  check.tokens("query", tensors.query, problem.num_heads);
  check.tokens("key", tensors.key, problem.num_kv_heads);
  check.tokens("value", tensors.value, problem.num_kv_heads);
  check.tokens("out", tensors.out, problem.num_heads);
  check.rows("lse", tensors.lse, problem.seqlen);
  if (plan.needs_branch_outputs()) {
    check.branch_rows("branch_out", tensors.branch_out, plan.branch_rows());
    check.rows("branch_lse", tensors.branch_lse, plan.branch_rows());
  }
  check.masks(tensors.masks);
  check.tokens("dquery", tensors.dquery, problem.num_heads);
  check.tokens("dkey", tensors.dkey, problem.num_kv_heads);
  check.tokens("dvalue", tensors.dvalue, problem.num_kv_heads);
  if (has_rows(problem)) {
    const Scratch scratch(check, plan, Pass::kBackward, context);
    plan.backend().backward(plan, tensors, scratch.context());
  } else {  // no query head or no token: nothing flows back
    fill_zero(tensors.dkey);
    fill_zero(tensors.dvalue);
  }
}

}  // namespace dilated
