// forward and backward: check the views against the plan, provide scratch, call the back end. No
// tensor memory is read or written here: it may belong to another device.
#include "dilated/attention.h"

#include <memory>
#include <new>
#include <tuple>

#include "src/backend_table.h"
#include "src/view_check.h"

namespace dilated {
namespace {

constexpr std::size_t kAlignment = 64;

/// The views of one call against its plan.
class CallCheck : public ViewCheck {
 public:
  CallCheck(const char* op, const Plan& plan)
      : ViewCheck(op, plan.problem().alignment),
        plan_(plan),
        problem_(plan.problem()),
        lse_dtype_(accumulation_dtype(problem_.dtype)) {}

  /// (batch, rows, heads, head_dim) of the problem's dtype, or not rounded.
  template <typename Void>
  void tokens(const char* name, const StridedView<Void, 4>& view, std::int64_t rows_expected,
              std::int64_t heads, bool may_be_unrounded) const {
    const bool unrounded = may_be_unrounded && view.dtype == lse_dtype_;
    tensor(name, view, {problem_.batch, rows_expected, heads, problem_.head_dim},
           unrounded ? lse_dtype_ : problem_.dtype);
    rows(name, view);
  }

  /// (batch, num_heads, rows), float32 or float64.
  template <typename Void>
  void row_values(const char* name, const StridedView<Void, 3>& view, std::int64_t count) const {
    tensor(name, view, {problem_.batch, problem_.num_heads, count}, lse_dtype_);
  }

  template <typename Void>
  void branches(const StridedView<Void, 4>& out, const StridedView<Void, 4>& lse) const {
    tensor("branch_out", out,
           {problem_.batch, problem_.num_heads, plan_.branch_rows(), problem_.head_dim},
           lse_dtype_);
    rows("branch_out", out);
    tensor("branch_lse", lse, {problem_.batch, problem_.num_heads, plan_.branch_rows(), 2},
           lse_dtype_);
    contiguous_rows("branch_lse", lse);
  }

  /// (batch, class rows, 1, head_dim).
  template <typename Void>
  void class_rows(const char* name, const StridedView<Void, 4>& view, DType dtype) const {
    if (problem_.key_layout == KeyLayout::kClassRows) {
      tensor(name, view, {problem_.batch, plan_.class_row_count(), 1, problem_.head_dim}, dtype);
      rows(name, view);
    } else if (view.defined()) {
      fail(name, "none, as the problem's keys come by position", "a tensor");
    }
  }

  template <typename Tensors>
  void inputs(const Tensors& tensors) const {
    const auto& [query, key, value, masks] =
        std::tie(tensors.query, tensors.key, tensors.value, tensors.masks);
    class_rows("class_key", tensors.class_key, problem_.dtype);
    class_rows("class_value", tensors.class_value, problem_.dtype);
    tokens("query", query, problem_.query_rows(), problem_.num_heads, false);
    tokens("key", key, problem_.key_rows(), problem_.num_kv_heads, false);
    tokens("value", value, problem_.key_rows(), problem_.num_kv_heads, false);
    if (problem_.has_key_mask) {
      shape("key_mask", masks.key_mask, {problem_.batch, problem_.key_rows()});
    } else if (masks.key_mask.defined()) {
      fail("key_mask", "none, as the problem has no key mask", "a tensor");
    }
    if (problem_.has_seqused != (masks.seqused != nullptr) && problem_.num_sequences() > 0) {
      fail("seqused",
           problem_.has_seqused ? "one length per sequence" : "none, as the problem has no seqused",
           problem_.has_seqused ? "none" : "lengths");
    }
    if (problem_.dropout_p > 0.0 && masks.dropout_state == nullptr) {
      fail("dropout_state", "(seed, offset) with dropout_p > 0", "none");
    }
    if (problem_.device.kind == Device::kCpu && masks.seqused != nullptr) {
      for (std::size_t s = 0; s < plan_.sequences().size(); ++s) {
        const std::int64_t length = plan_.sequences()[s].length;
        if (masks.seqused[s] < 0 || masks.seqused[s] > length) {
          fail(fmt::format("seqused[{}]", s).c_str(),
               fmt::format("0 <= length <= that of the sequence, {}", length),
               fmt::format("{}", masks.seqused[s]));
        }
      }
    }
  }

 private:
  const Plan& plan_;
  const Problem& problem_;
  DType lse_dtype_;
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
    const DeviceSpec& device = plan.problem().device;
    if (device.kind == Device::kCpu) {
      provide_threads(check, device);
    }
    const std::int64_t bytes = plan.workspace_bytes(pass);
    const auto needed = static_cast<std::size_t>(bytes);
    if (context_.workspace.empty() && device.kind == Device::kCpu) {
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
  void provide_threads(const ViewCheck& check, const DeviceSpec& device) {
    if (context_.parallel_for == nullptr) {
      context_.parallel_for = &default_parallel_for();
    }
    const std::int64_t most =
        device.units > 0 ? device.units : default_parallel_for().num_threads();
    const int threads = context_.parallel_for->num_threads();
    if (threads < 1 || threads > most) {
      check.fail("parallel_for", fmt::format("1 to {} threads", most), fmt::format("{}", threads),
                 "device.units of the problem says for how many threads the plan has scratch");
    }
  }

  Context context_;
  std::unique_ptr<std::byte[], FreeAligned> owned_;
};

}  // namespace

void forward(const Plan& plan, const ForwardTensors& t, const Context& context) {
  const Problem& problem = plan.problem();
  const CallCheck check("forward", plan);
  check.inputs(t);
  check.tokens("out", t.out, problem.query_rows(), problem.num_heads, true);
  check.row_values("lse", t.lse, problem.query_rows());
  if (t.lse_residual.defined()) {
    check.row_values("lse_residual", t.lse_residual, problem.query_rows());
  }
  if (t.branch_out.defined() || t.branch_lse.defined()) {
    check.branches(t.branch_out, t.branch_lse);
  }
  check.outputs({{"out", t.out},
                 {"lse", t.lse},
                 {"lse_residual", t.lse_residual},
                 {"branch_out", t.branch_out},
                 {"branch_lse", t.branch_lse}},
                {{"query", t.query},
                 {"key", t.key},
                 {"value", t.value},
                 {"class_key", t.class_key},
                 {"class_value", t.class_value}});
  const Scratch scratch(check, plan, Pass::kForward, context);
  if (problem.batch * problem.query_rows() * problem.num_heads > 0) {
    plan.backend().forward(plan, t, scratch.context());
  }
}

void backward(const Plan& plan, const BackwardTensors& t, const Context& context) {
  const Problem& problem = plan.problem();
  const CallCheck check("backward", plan);
  const std::int64_t query_rows = problem.query_rows();
  const std::int64_t key_rows = problem.key_rows();
  check.tokens("dout", t.dout, query_rows, problem.num_heads, true);
  if (t.dlse.defined()) {
    check.row_values("dlse", t.dlse, query_rows);
  }
  check.inputs(t);
  check.tokens("out", t.out, query_rows, problem.num_heads, true);
  check.row_values("lse", t.lse, query_rows);
  if (t.lse_residual.defined()) {
    check.row_values("lse_residual", t.lse_residual, query_rows);
  }
  if (plan.needs_branch_outputs()) {
    check.branches(t.branch_out, t.branch_lse);
    for (const Sequence& sequence : plan.sequences()) {
      if (sequence.keys != Range{0, sequence.length} &&
          problem.key_layout == KeyLayout::kPositions) {
        reject<Unsupported>("lse_grad",
                            "true for gradients of windows that hold a part of the keys", "false",
                            "detached merge weights need every branch's result over all keys");
      }
    }
  }
  check.tokens("dquery", t.dquery, query_rows, problem.num_heads, true);
  check.tokens("dkey", t.dkey, key_rows, problem.num_kv_heads, true);
  check.tokens("dvalue", t.dvalue, key_rows, problem.num_kv_heads, true);
  check.class_rows("dclass_key", t.dclass_key, accumulation_dtype(problem.dtype));
  check.class_rows("dclass_value", t.dclass_value, accumulation_dtype(problem.dtype));
  check.outputs({{"dquery", t.dquery},
                 {"dkey", t.dkey},
                 {"dvalue", t.dvalue},
                 {"dclass_key", t.dclass_key},
                 {"dclass_value", t.dclass_value}},
                {{"dout", t.dout},
                 {"dlse", t.dlse},
                 {"query", t.query},
                 {"key", t.key},
                 {"value", t.value},
                 {"class_key", t.class_key},
                 {"class_value", t.class_value},
                 {"out", t.out},
                 {"lse", t.lse},
                 {"branch_out", t.branch_out},
                 {"branch_lse", t.branch_lse}});
  const Scratch scratch(check, plan, Pass::kBackward, context);
  if (problem.batch * (query_rows * problem.num_heads + key_rows * problem.num_kv_heads) > 0) {
    plan.backend().backward(plan, t, scratch.context());
  }
}

}  // namespace dilated
