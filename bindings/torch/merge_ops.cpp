// merge and merge_backward: partial results of the user's layouts -> the core's.
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "dilated/error.h"
#include "dilated/merge.h"

#include "bindings/torch/arguments.h"
#include "bindings/torch/operators.h"
#include "bindings/torch/views.h"

namespace dilated::binding {
namespace {

[[noreturn]] void refuse(const std::string& argument, const std::string& expected,
                         const std::string& got, const std::string& hint = "") {
  raise<InvalidProblem>({"merge", argument, expected, got, hint});
}

/// Checked parts and the views of them.
struct Parts {
  Parts(const std::vector<Tensor>& outs, const std::vector<Tensor>& lses, std::int64_t layout_index)
      : layout(parse_layout(layout_names().at(static_cast<std::size_t>(layout_index)))) {
    for (std::size_t i = 0; i < outs.size(); ++i) {
      const std::string name = "parts[" + std::to_string(i) + "]";
      const TensorInfo out = info_of((name + ".out").c_str(), outs[i]);
      const std::size_t rank = layout == Layout::kShd ? 3 : 4;
      if (out.shape.size() != rank || lses[i].dim() != static_cast<std::int64_t>(rank) - 1) {
        refuse(name,
               "out of " + std::to_string(rank) + " and lse of " + std::to_string(rank - 1) +
                   " dimensions with layout " +
                   layout_names()[static_cast<std::size_t>(layout_index)],
               std::to_string(out.shape.size()) + " and " + std::to_string(lses[i].dim()));
      }
      const TensorInfo lse = info_of((name + ".lse").c_str(), lses[i]);
      if (i == 0) {
        device_name = out.device;
        device = parse_device(out.name, out.device);
      }
      for (const TensorInfo* info : {&out, &lse}) {
        check_device(*info);
      }
      const DType dtype = parse_dtype(out.name, out.dtype);
      views.push_back({token_view(out, outs[i], layout, dtype),
                       row_view(lses[i], parse_dtype(name + ".lse", dtype_name(lses[i])))});
    }
    if (views.empty()) {
      refuse("parts", "at least one partial result", "none");
    }
  }

  DType dtype() const { return views.front().out.dtype; }

  void check_device(const TensorInfo& info) const {
    if (info.device != device_name) {
      refuse(info.name, "the device of parts[0].out, " + device_name, info.device);
    }
  }

  Layout layout;
  std::string device_name;
  DeviceSpec device;
  std::vector<Partial> views;
};

std::vector<std::int64_t> shape_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return {sizes.begin(), sizes.end()};
}

/// `dtype` is an index of `dtype_names`, that of out.
std::tuple<Tensor, Tensor> merge_op(const std::vector<Tensor>& outs,
                                    const std::vector<Tensor>& lses, std::int64_t layout,
                                    std::int64_t dtype_index) {
  const Parts parts(outs, lses, layout);
  const DType dtype = dtype_at(dtype_index);
  const DType rows_dtype = accumulation_dtype(parts.dtype());
  Tensor out = new_empty(outs[0], shape_of(outs[0]), dtype);
  Tensor lse = new_empty(outs[0], shape_of(lses[0]), rows_dtype);
  const TorchParallelFor threads;
  merge(parts.views, new_token_view(out, parts.layout, dtype), new_row_view(lse, rows_dtype),
        {.parallel_for = &threads, .workspace = {}, .stream = current_stream(outs[0])},
        parts.device);
  return {std::move(out), std::move(lse)};
}

std::tuple<std::vector<Tensor>, std::vector<Tensor>> merge_backward_op(
    const Tensor& dout_given, const std::optional<Tensor>& dlse, const std::vector<Tensor>& outs,
    const std::vector<Tensor>& lses, std::int64_t layout) {
  const Parts parts(outs, lses, layout);
  const Tensor dout = torch::stable::contiguous(dout_given);  // it may be expanded
  const TensorInfo dout_info = info_of("dout", dout);
  parts.check_device(dout_info);
  const DType rows_dtype = accumulation_dtype(parts.dtype());
  std::vector<Tensor> douts;
  std::vector<Tensor> dlses;
  std::vector<PartialGradient> gradients;
  for (std::size_t i = 0; i < outs.size(); ++i) {
    douts.push_back(new_empty(outs[i], shape_of(outs[i]), parts.dtype()));
    dlses.push_back(new_empty(lses[i], shape_of(lses[i]), rows_dtype));
    gradients.push_back({new_token_view(douts[i], parts.layout, parts.dtype()),
                         new_row_view(dlses[i], rows_dtype)});
  }
  const TorchParallelFor threads;
  merge_backward(
      parts.views, token_view(dout_info, dout, parts.layout, parse_dtype("dout", dout_info.dtype)),
      dlse ? row_view(*dlse, rows_dtype) : ConstRowView{}, gradients,
      {.parallel_for = &threads, .workspace = {}, .stream = current_stream(outs[0])}, parts.device);
  return {std::move(douts), std::move(dlses)};
}

}  // namespace

void define_merge(Library& library) {
  library.def(
      "merge(Tensor[] outs, Tensor[] lses, int layout, int dtype) -> (Tensor out, Tensor lse)");
  library.def(
      "merge_backward(Tensor dout, Tensor? dlse, Tensor[] outs, Tensor[] lses, int layout) -> "
      "(Tensor[] douts, Tensor[] dlses)");
}

void implement_merge(Library& library) {
  library.impl("merge", TORCH_BOX(&Typed<&merge_op>::call));
  library.impl("merge_backward", TORCH_BOX(&Typed<&merge_backward_op>::call));
}

}  // namespace dilated::binding
