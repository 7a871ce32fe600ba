// Inputs from val(), one guarded call, comparisons of whole results.
#include "tests/support/call.h"

#include <algorithm>
#include <new>
#include <span>
#include <stdexcept>

#include "src/sequences.h"

namespace dilated::testing {
namespace {

constexpr std::size_t kGuard = 64;

/// Scratch of exactly the stated size, poisoned, with guard bytes on both sides.
class GuardedWorkspace {
 public:
  explicit GuardedWorkspace(std::int64_t bytes)
      : size_(static_cast<std::size_t>(bytes)), memory_(size_ + 3 * kGuard, std::byte{0xFF}) {
    const auto address = reinterpret_cast<std::uintptr_t>(memory_.data());
    begin_ = kGuard + (kGuard - address % kGuard) % kGuard;
  }

  std::span<std::byte> span() { return {memory_.data() + begin_, size_}; }

  void check() const {
    for (std::size_t i = 0; i < memory_.size(); ++i) {
      if ((i < begin_ || i >= begin_ + size_) && memory_[i] != std::byte{0xFF}) {
        throw std::logic_error("bytes outside the workspace were written");
      }
    }
  }

 private:
  std::size_t size_;
  std::vector<std::byte> memory_;
  std::size_t begin_ = 0;
};

void fill_stream(Tensor& tensor, std::uint64_t seed, double amplitude) {
  std::uint64_t index = 0;
  tensor.for_each([&](auto i, auto j, auto k, auto c) {
    tensor.set(i, j, k, c, amplitude * val(seed, index++));
  });
}

DType lse_dtype(DType dtype) { return dtype == DType::kFloat64 ? dtype : DType::kFloat32; }

}  // namespace

double val(std::uint64_t seed, std::uint64_t i) {
  std::uint64_t z = (seed << 32) + i + 0x9E3779B97F4A7C15u;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  z ^= z >> 31;
  return static_cast<double>(z >> 11) * 0x1p-52 - 1.0;
}

Inputs Inputs::in_float64() const {
  Inputs result = *this;
  for (Tensor* tensor : {&result.query, &result.key, &result.value, &result.dout}) {
    *tensor = tensor->converted(DType::kFloat64);
  }
  if (dlse) {
    result.dlse = dlse->converted(DType::kFloat64);
  }
  return result;
}

Masks Inputs::masks(const Problem& problem) const {
  Masks masks;
  if (problem.has_key_mask) {
    masks.key_mask = {key_mask.data(),
                      DType::kFloat32,
                      {problem.batch, problem.key_rows()},
                      {problem.key_rows(), 1}};
  }
  masks.seqused = problem.has_seqused ? seqused.data() : nullptr;
  masks.dropout_state = dropout_state.data();
  return masks;
}

Inputs make_inputs(const Problem& problem, const InputOptions& options) {
  const std::int64_t rows = problem.query_rows();
  const Tensor::Shape query = {problem.batch, rows, problem.num_heads, problem.head_dim};
  const Tensor::Shape key = {problem.batch, problem.key_rows(), problem.num_kv_heads,
                             problem.head_dim};
  Inputs inputs{Tensor(problem.dtype, query, options.layout),
                Tensor(problem.dtype, key, options.layout),
                Tensor(problem.dtype, key, options.layout),
                Tensor(problem.dtype, query, options.layout),
                std::nullopt,
                {},
                {},
                {11, 5}};
  std::uint64_t seed = options.first_seed;
  for (Tensor* tensor : {&inputs.query, &inputs.key, &inputs.value, &inputs.dout}) {
    fill_stream(*tensor, seed++, options.amplitude);
  }
  if (options.with_dlse) {
    inputs.dlse = Tensor(lse_dtype(problem.dtype), {problem.batch, problem.num_heads, rows, 1});
    for (std::int64_t b = 0; b < problem.batch; ++b) {
      for (std::int64_t p = 0; p < rows; ++p) {
        for (std::int64_t h = 0; h < problem.num_heads; ++h) {
          const std::int64_t index = (b * rows + p) * problem.num_heads + h;
          inputs.dlse->set(b, h, p, 0, val(seed, static_cast<std::uint64_t>(index)));
        }
      }
    }
  }
  if (problem.has_key_mask) {
    for (std::int64_t i = 0; i < problem.batch * problem.key_rows(); ++i) {
      inputs.key_mask.push_back(i % 3 != 1);
    }
  }
  if (problem.has_seqused) {
    for (const Sequence& sequence : sequences_of(problem)) {
      inputs.seqused.push_back(sequence.length * 2 / 3);
    }
  }
  return inputs;
}

Results run(const Problem& problem, const Inputs& inputs, const RunOptions& options) {
  Problem on_threads = problem;
  if (options.parallel_for != nullptr) {
    on_threads.device.units = options.parallel_for->num_threads();
  }
  return run(make_plan(on_threads, options.backend), inputs, options);
}

Results run(const Plan& plan, const Inputs& inputs, const RunOptions& options) {
  const Problem& problem = plan.problem();
  const DType rows = lse_dtype(problem.dtype);
  const bool class_rows = problem.key_layout == KeyLayout::kClassRows;
  const auto like = [&](const Tensor& tensor) {
    return Tensor(options.unrounded ? rows : problem.dtype, tensor.shape(), options.layout);
  };
  Results results{
      like(inputs.query),
      Tensor(rows, {problem.batch, problem.num_heads, problem.query_rows(), 1}, options.layout),
      like(inputs.query), like(inputs.key), like(inputs.value)};
  Tensor branch_out(rows, {problem.batch, problem.num_heads, plan.branch_rows(), problem.head_dim});
  Tensor branch_lse(rows, {problem.batch, problem.num_heads, plan.branch_rows(), 2});
  Tensor lse_residual(rows, results.lse.shape());
  {
    ForwardTensors tensors{std::as_const(inputs.query).view(),
                           inputs.key.view(),
                           inputs.value.view(),
                           inputs.masks(problem),
                           results.out.view(),
                           results.lse.rows(),
                           lse_residual.rows(),
                           {},
                           {}};
    if (class_rows) {
      tensors.class_key = inputs.class_key.view();
      tensors.class_value = inputs.class_value.view();
    }
    if (plan.needs_branch_outputs()) {
      tensors.branch_out = branch_out.view();
      tensors.branch_lse = branch_lse.view();
    }
    GuardedWorkspace workspace(plan.workspace_bytes(Pass::kForward));
    forward(plan, tensors, {.parallel_for = options.parallel_for, .workspace = workspace.span()});
    workspace.check();
  }
  BackwardTensors tensors;
  tensors.dout = inputs.dout.view();
  if (inputs.dlse) {
    tensors.dlse = inputs.dlse->rows();
  }
  tensors.query = inputs.query.view();
  tensors.key = inputs.key.view();
  tensors.value = inputs.value.view();
  tensors.out = std::as_const(results.out).view();
  tensors.lse = std::as_const(results.lse).rows();
  tensors.lse_residual = std::as_const(lse_residual).rows();
  if (plan.needs_branch_outputs()) {
    tensors.branch_out = std::as_const(branch_out).view();
    tensors.branch_lse = std::as_const(branch_lse).view();
  }
  if (class_rows) {
    results.dclass_key = Tensor(rows, inputs.class_key.shape());
    results.dclass_value = Tensor(rows, inputs.class_key.shape());
    tensors.class_key = inputs.class_key.view();
    tensors.class_value = inputs.class_value.view();
    tensors.dclass_key = results.dclass_key.view();
    tensors.dclass_value = results.dclass_value.view();
  }
  tensors.masks = inputs.masks(problem);
  tensors.dquery = results.dquery.view();
  tensors.dkey = results.dkey.view();
  tensors.dvalue = results.dvalue.view();
  GuardedWorkspace workspace(plan.workspace_bytes(Pass::kBackward));
  backward(plan, tensors, {.parallel_for = options.parallel_for, .workspace = workspace.span()});
  workspace.check();
  for (const NamedResult& result : kResults) {
    if (!(results.*result.member).gaps_are_untouched()) {
      throw std::logic_error("memory between the rows of " + std::string(result.name) +
                             " was written");
    }
  }
  return results;
}

Results reference(const Problem& problem, const Inputs& inputs) {
  Problem exact = problem;
  exact.dtype = DType::kFloat64;
  return run(exact, inputs.in_float64(), {.backend = "reference"});
}

Problem paper_problem(std::int64_t seqlen, std::int64_t heads, std::int64_t head_dim,
                      const std::vector<std::pair<std::int64_t, std::int64_t>>& branches) {
  Problem problem;
  problem.seqlen = seqlen;
  problem.num_heads = heads;
  problem.num_kv_heads = heads;
  problem.head_dim = head_dim;
  for (const auto& [segment, dilation] : branches) {
    Branch branch{segment, dilation, {}};
    for (std::int64_t h = 0; h < heads; ++h) {
      branch.offsets.push_back(h % dilation);
    }
    problem.branches.push_back(branch);
  }
  return problem;
}

std::string difference(const Results& a, const Results& b, double tolerance) {
  for (const NamedResult& result : kResults) {
    const std::string text = difference(a.*result.member, b.*result.member, tolerance);
    if (!text.empty()) {
      return std::string(result.name) + text;
    }
  }
  return "";
}

std::string bit_difference(const Results& a, const Results& b) {
  for (const NamedResult& result : kResults) {
    const std::string text = bit_difference(a.*result.member, b.*result.member);
    if (!text.empty()) {
      return std::string(result.name) + text;
    }
  }
  return "";
}

}  // namespace dilated::testing
