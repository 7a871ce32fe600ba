// Schemas of all operators, and the CPU kernels of forward and backward:
//   tensors -> TensorInfo (checked) -> Shapes -> Problem -> Plan -> views, workspace -> core
#include <array>
#include <string>
#include <tuple>
#include <vector>

#include "dilated/attention.h"
#include "dilated/error.h"
#include "dilated/plan.h"

#include "bindings/torch/arguments.h"
#include "bindings/torch/inputs.h"
#include "bindings/torch/queries.h"
#include "bindings/torch/stable_abi.h"

namespace dilated::binding {
namespace {

/// Optional host tensors and masks, as they come in every call.
struct Extras {
  const std::optional<Tensor>& key_mask;
  const std::optional<Tensor>& seqused;
  const std::optional<Tensor>& cu_seqlens;
  const std::optional<Tensor>& dropout_seed;
};

/// A checked call: what both passes need before they touch memory.
struct Call {
  Inputs inputs;
  Layout layout;
  Shapes shapes;
  Plan plan;
};

const std::int64_t* int64_data(const Tensor& tensor) {
  return static_cast<const std::int64_t*>(tensor.const_data_ptr());
}

Call make_call(const Options& options, const Tensor& query, const Tensor& key, const Tensor& value,
               const Extras& extras, StringHandle layout_name, StringHandle backend_name) {
  const std::string layout_text = take(layout_name);
  const std::string backend = take(backend_name);
  const Layout layout = parse_layout(layout_text);
  Inputs inputs{info_of("query", query),
                info_of("key", key),
                info_of("value", value),
                info_of("key_mask", extras.key_mask),
                info_of("seqused", extras.seqused),
                info_of("cu_seqlens", extras.cu_seqlens),
                info_of("dropout_seed", extras.dropout_seed)};
  Shapes shapes = shapes_of(inputs, layout, options.dropout_p);
  if (extras.cu_seqlens) {
    const Tensor& cu = *extras.cu_seqlens;
    const std::int64_t* data = int64_data(cu);
    shapes.cu_seqlens.assign(data, data + cu.size(0));
  }
  shapes.device.units = TorchParallelFor().num_threads();
  Plan plan = make_plan(make_problem(options, shapes), backend);
  return {std::move(inputs), layout, std::move(shapes), std::move(plan)};
}

/// Non-null even for tensors without elements, where a null pointer would read as "not given".
template <typename Void>
Void* data_or_placeholder(Void* data) {
  static std::array<std::byte, 64> placeholder;
  return data != nullptr ? data : placeholder.data();
}

ConstTensorView token_view(const TensorInfo& info, const Tensor& tensor, const Call& call) {
  ConstTensorView view = token_view<const void>(info, call.layout, call.shapes.dtype,
                                                data_or_placeholder(tensor.const_data_ptr()));
  if (tensor.numel() == 0) {  // torch leaves any strides on a tensor without elements
    view.strides[3] = 1;
  }
  return view;
}

/// Contiguous tensor in the user's layout that receives a gradient or the output.
TensorView new_token_view(const TensorInfo& like, const Tensor& tensor, const Call& call) {
  const auto strides = tensor.strides();
  const TensorInfo info{
      like.name, like.dtype, like.device, like.shape, {strides.begin(), strides.end()}};
  return token_view<void>(info, call.layout, call.shapes.dtype,
                          data_or_placeholder(tensor.mutable_data_ptr()));
}

DType lse_dtype(const Shapes& shapes) {
  return shapes.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
}

/// (batch, heads, rows), or packed (heads, rows).
template <typename Void>
StridedView<Void, 3> row_view(const Tensor& tensor, Void* data, DType dtype) {
  const auto n = tensor.sizes();
  const auto s = tensor.strides();
  data = data_or_placeholder(data);
  if (n.size() == 2) {
    return {data, dtype, {1, n[0], n[1]}, {0, s[0], s[1]}};
  }
  return {data, dtype, {n[0], n[1], n[2]}, {s[0], s[1], s[2]}};
}

/// (batch, heads, rows, head_dim) of saved branch outputs.
template <typename Void>
StridedView<Void, 4> branch_view(const Tensor& tensor, Void* data, DType dtype) {
  const auto n = tensor.sizes();
  const auto s = tensor.strides();
  return {data_or_placeholder(data), dtype, {n[0], n[1], n[2], n[3]}, {s[0], s[1], s[2], s[3]}};
}

Masks masks_of(const Extras& extras, const Call& call) {
  Masks masks;
  if (extras.key_mask) {
    const Tensor& mask = *extras.key_mask;
    const auto s = mask.strides();
    const bool packed = call.layout == Layout::kShd;
    masks.key_mask = {data_or_placeholder(mask.const_data_ptr()),
                      DType::kFloat32,  // ignored: bytes
                      {call.shapes.batch, call.shapes.seqlen},
                      {packed ? 0 : s[0], packed ? s[0] : s[1]}};
  }
  if (extras.seqused) {
    masks.seqused = int64_data(*extras.seqused);
  }
  if (extras.dropout_seed) {
    masks.dropout_state = int64_data(*extras.dropout_seed);
  }
  return masks;
}

/// Threads and scratch memory of one pass, both torch's.
class TorchContext {
 public:
  TorchContext(const Call& call, Pass pass, const Tensor& like)
      : bytes_(call.plan.workspace_bytes(pass)), workspace_(new_workspace(like, bytes_)) {}

  Context context() const {
    return {.parallel_for = &threads_,
            .workspace = {static_cast<std::byte*>(workspace_.mutable_data_ptr()),
                          static_cast<std::size_t>(bytes_)}};
  }

 private:
  TorchParallelFor threads_;
  std::int64_t bytes_;
  Tensor workspace_;
};

std::tuple<Tensor, Tensor, Tensor, Tensor> forward_op(
    const Options& options, const Tensor& query, const Tensor& key, const Tensor& value,
    const std::optional<Tensor>& key_mask, const std::optional<Tensor>& seqused,
    const std::optional<Tensor>& cu_seqlens, const std::optional<Tensor>& dropout_seed,
    StringHandle layout, StringHandle backend, bool save_branches) {
  const Extras extras{key_mask, seqused, cu_seqlens, dropout_seed};
  const Call call = make_call(options, query, key, value, extras, layout, backend);
  const Shapes& shapes = call.shapes;
  const DType rows_dtype = lse_dtype(shapes);
  const std::int64_t rows =
      save_branches && call.plan.needs_branch_outputs() ? call.plan.branch_rows() : 0;
  Tensor out = new_empty(query, call.inputs.query.shape, shapes.dtype);
  Tensor lse = new_empty(query, lse_shape(shapes, call.layout), rows_dtype);
  Tensor branch_out =
      new_empty(query, {shapes.batch, shapes.num_heads, rows, shapes.head_dim}, rows_dtype);
  Tensor branch_lse = new_empty(query, {shapes.batch, shapes.num_heads, rows}, rows_dtype);

  ForwardTensors tensors;
  tensors.query = token_view(call.inputs.query, query, call);
  tensors.key = token_view(call.inputs.key, key, call);
  tensors.value = token_view(call.inputs.value, value, call);
  tensors.masks = masks_of(extras, call);
  tensors.out = new_token_view(call.inputs.query, out, call);
  tensors.lse = row_view(lse, lse.mutable_data_ptr(), rows_dtype);
  if (rows > 0) {
    tensors.branch_out = branch_view(branch_out, branch_out.mutable_data_ptr(), rows_dtype);
    tensors.branch_lse = row_view(branch_lse, branch_lse.mutable_data_ptr(), rows_dtype);
  }
  const TorchContext context(call, Pass::kForward, query);
  forward(call.plan, tensors, context.context());
  return {std::move(out), std::move(lse), std::move(branch_out), std::move(branch_lse)};
}

std::tuple<Tensor, Tensor, Tensor> backward_op(
    const Options& options, const Tensor& dout_given, const std::optional<Tensor>& dlse,
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& out,
    const Tensor& lse, const Tensor& branch_out, const Tensor& branch_lse,
    const std::optional<Tensor>& key_mask, const std::optional<Tensor>& seqused,
    const std::optional<Tensor>& cu_seqlens, const std::optional<Tensor>& dropout_seed,
    StringHandle layout, StringHandle backend) {
  const Extras extras{key_mask, seqused, cu_seqlens, dropout_seed};
  const Call call = make_call(options, query, key, value, extras, layout, backend);
  const DType rows_dtype = lse_dtype(call.shapes);
  // Gradients may be expanded (out.sum()): only then a copy is made.
  const Tensor dout = dout_given.sizes().back() > 1 && dout_given.strides().back() != 1
                          ? torch::stable::contiguous(dout_given)
                          : dout_given;
  Tensor dquery = new_empty(query, call.inputs.query.shape, call.shapes.dtype);
  Tensor dkey = new_empty(key, call.inputs.key.shape, call.shapes.dtype);
  Tensor dvalue = new_empty(value, call.inputs.value.shape, call.shapes.dtype);

  BackwardTensors tensors;
  tensors.dout = token_view(info_of("dout", dout), dout, call);
  if (dlse) {
    tensors.dlse = row_view(*dlse, dlse->const_data_ptr(), rows_dtype);
  }
  tensors.query = token_view(call.inputs.query, query, call);
  tensors.key = token_view(call.inputs.key, key, call);
  tensors.value = token_view(call.inputs.value, value, call);
  tensors.out = token_view(info_of("out", out), out, call);
  tensors.lse = row_view(lse, lse.const_data_ptr(), rows_dtype);
  if (call.plan.needs_branch_outputs()) {
    tensors.branch_out = branch_view(branch_out, branch_out.const_data_ptr(), rows_dtype);
    tensors.branch_lse = row_view(branch_lse, branch_lse.const_data_ptr(), rows_dtype);
  }
  tensors.masks = masks_of(extras, call);
  tensors.dquery = new_token_view(call.inputs.query, dquery, call);
  tensors.dkey = new_token_view(call.inputs.key, dkey, call);
  tensors.dvalue = new_token_view(call.inputs.value, dvalue, call);
  const TorchContext context(call, Pass::kBackward, query);
  backward(call.plan, tensors, context.context());
  return {std::move(dquery), std::move(dkey), std::move(dvalue)};
}

constexpr const char* kExtrasSchema =
    "Tensor? key_mask, Tensor? seqused, Tensor? cu_seqlens, Tensor? dropout_seed, str layout, str "
    "backend";

}  // namespace

STABLE_TORCH_LIBRARY(dilated, library) {
  const std::string options = std::string(", ") + kOptionsSchema;
  library.def(("forward(Tensor query, Tensor key, Tensor value, " + std::string(kExtrasSchema) +
               ", bool save_branches" + options +
               ") -> (Tensor out, Tensor lse, Tensor branch_out, Tensor branch_lse)")
                  .c_str());
  library.def(
      ("backward(Tensor dout, Tensor? dlse, Tensor query, Tensor key, Tensor value, Tensor out, "
       "Tensor lse, Tensor branch_out, Tensor branch_lse, " +
       std::string(kExtrasSchema) + options + ") -> (Tensor dquery, Tensor dkey, Tensor dvalue)")
          .c_str());
  define_queries(library);
}

STABLE_TORCH_LIBRARY_IMPL(dilated, CPU, library) {
  library.impl("forward", TORCH_BOX(&WithOptions<&forward_op>::call));
  library.impl("backward", TORCH_BOX(&WithOptions<&backward_op>::call));
}

}  // namespace dilated::binding
