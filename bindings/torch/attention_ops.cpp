// forward, forward_saving and backward, and the latter two with keys by class rows:
//   tensors -> TensorInfo (checked) -> Shapes -> Problem -> Plan -> views, workspace -> core
#include <algorithm>
#include <string>
#include <tuple>
#include <utility>

#include "dilated/attention.h"
#include "dilated/plan.h"

#include "bindings/torch/arguments.h"
#include "bindings/torch/operators.h"
#include "bindings/torch/views.h"

namespace dilated::binding {
namespace {

/// Optional tensors of every call.
struct OptionalTensors {
  const std::optional<Tensor>& key_mask;
  const std::optional<Tensor>& seqused;
  const std::optional<Tensor>& cu_seqlens;
  const std::optional<Tensor>& windows;
  const std::optional<Tensor>& dropout_seed;
  // (batch, class rows, head_dim), with the keys of a shard
  const Tensor* class_key = nullptr;
  const Tensor* class_value = nullptr;
};

constexpr const char* kOptionalSchema =
    "Tensor? key_mask, Tensor? seqused, Tensor? cu_seqlens, Tensor? windows, Tensor? dropout_seed, "
    "Tensor? scale_tensor";

/// A checked call: what both passes need before they touch memory.
struct Call {
  Inputs inputs;
  Layout layout;
  Shapes shapes;
  Plan plan;

  /// Windows of no sequence cannot say how many rows they have; then no tensor has an element.
  bool has_sequences() const { return !inputs.windows || shapes.batch > 0; }
  DType rows_dtype() const { return accumulation_dtype(shapes.dtype); }
  /// Windows give partial results, which are not rounded.
  DType out_dtype() const {
    return inputs.windows && !has_class_rows() ? rows_dtype() : shapes.dtype;
  }
  bool has_class_rows() const { return shapes.key_layout == KeyLayout::kClassRows; }
};

const std::int64_t* int64_data(const Tensor& tensor) {
  return static_cast<const std::int64_t*>(tensor.const_data_ptr());
}

/// A compiler makes one graph per float, but one for all values of a tensor: scale may come as
/// either.
std::optional<double> scale_of(const std::optional<Tensor>& tensor, std::optional<double> number) {
  if (!tensor) {
    return number;
  }
  if (!tensor->is_cpu() || tensor->dim() != 0 || dtype_name(*tensor) != "float64" || number) {
    reject("scale_tensor", "a float64 CPU tensor without dimensions, instead of scale",
           std::string(dtype_name(*tensor)));
  }
  return *static_cast<const double*>(tensor->const_data_ptr());
}

void read_cu_seqlens(const Tensor& cu, Shapes& shapes) {
  const std::int64_t* data = int64_data(cu);
  shapes.cu_seqlens.assign(data, data + cu.size(0));
}

/// Rows of `windows`: length, query begin and end, key begin and end.
void read_windows(const Tensor& windows, Layout layout, Shapes& shapes) {
  const bool packed = layout == Layout::kShd;
  if (packed) {
    shapes.cu_seqlens = {0};
  }
  for (std::int64_t s = 0; s < windows.size(0); ++s) {
    const std::int64_t* row = int64_data(windows) + s * windows.strides()[0];
    shapes.windows.push_back({{row[1], row[2]}, {row[3], row[4]}});
    if (packed) {
      shapes.cu_seqlens.push_back(shapes.cu_seqlens.back() + row[0]);
    } else if (s > 0 && row[0] != shapes.seqlen) {
      reject("seqlen", "one length for all sequences, unless packed",
             std::to_string(shapes.seqlen) + " and " + std::to_string(row[0]),
             "seqused says how much of each is used");
    } else {
      shapes.seqlen = row[0];
    }
  }
  if (packed) {
    shapes.seqlen = shapes.cu_seqlens.back();
  }
}

/// The largest power of two, at most torch's own alignment, that divides the pointers and the
/// strides of what is read and the rows of what is written.
std::int64_t alignment_of(std::initializer_list<const Tensor*> tensors, std::int64_t row_bytes) {
  std::uint64_t bits = 64 | static_cast<std::uint64_t>(row_bytes);
  for (const Tensor* tensor : tensors) {
    if (tensor == nullptr || tensor->numel() == 0) {
      continue;  // read through a placeholder with any strides
    }
    const auto element = static_cast<std::uint64_t>(tensor->element_size());
    bits |= reinterpret_cast<std::uintptr_t>(tensor->const_data_ptr());
    const auto strides = tensor->strides();
    for (std::size_t i = 0; i + 1 < strides.size(); ++i) {
      bits |= static_cast<std::uint64_t>(strides[i]) * element;
    }
  }
  return static_cast<std::int64_t>(bits & (~bits + 1));
}

/// `dout` is null in forward.
Call make_call(const CallOptions& options, const Tensor& query, const Tensor& key,
               const Tensor& value, const OptionalTensors& optional, const Tensor* dout) {
  Inputs inputs{info_of("query", query),
                info_of("key", key),
                info_of("value", value),
                info_of("key_mask", optional.key_mask),
                info_of("seqused", optional.seqused),
                info_of("cu_seqlens", optional.cu_seqlens),
                info_of("windows", optional.windows),
                info_of("dropout_seed", optional.dropout_seed)};
  Shapes shapes = shapes_of(inputs, options.layout, options.core.dropout_p);
  if (optional.cu_seqlens) {
    read_cu_seqlens(*optional.cu_seqlens, shapes);
  }
  if (optional.windows) {
    read_windows(*optional.windows, options.layout, shapes);
  }
  if (shapes.device.kind == Device::kCpu) {
    shapes.device.units = TorchParallelFor().num_threads();
  }
  const bool empty = query.numel() == 0 || key.numel() == 0;
  if (!empty) {
    const std::int64_t row_bytes = shapes.head_dim * size_of(shapes.dtype);
    shapes.alignment = alignment_of(
        {&query, &key, &value, dout, optional.class_key, optional.class_value}, row_bytes);
  }
  if (optional.class_key != nullptr) {
    shapes.key_layout = KeyLayout::kClassRows;
  }
  Plan plan = make_plan(make_problem(options.core, shapes), options.backend);
  return {std::move(inputs), options.layout, std::move(shapes), std::move(plan)};
}

/// (batch, class rows, head_dim) as one head.
ConstTensorView class_row_view(const char* name, const Tensor& tensor, const Call& call) {
  const auto n = tensor.sizes();
  const auto s = tensor.strides();
  const bool empty = tensor.numel() == 0;
  if (n.size() != 3 || dtype_name(tensor) != name_of(call.shapes.dtype) ||
      (!empty && n[2] > 1 && s[2] != 1)) {
    reject(name, "query's dtype and shape (batch, class rows, head_dim)",
           std::to_string(n.size()) + " dimensions of " + std::string(dtype_name(tensor)));
  }
  return {data_or_placeholder(tensor.const_data_ptr()),
          call.shapes.dtype,
          {n[0], n[1], 1, n[2]},
          {s[0], s[1], n[2], 1}};
}

TensorView new_class_row_view(const Tensor& tensor, DType dtype) {
  const auto n = tensor.sizes();
  return {data_or_placeholder(tensor.mutable_data_ptr()),
          dtype,
          {n[0], n[1], 1, n[2]},
          {n[1] * n[2], n[2], n[2], 1}};
}

Masks masks_of(const OptionalTensors& optional, const Call& call) {
  Masks masks;
  if (optional.key_mask) {
    const Tensor& mask = *optional.key_mask;
    const auto s = mask.strides();
    const bool packed = call.layout == Layout::kShd;
    masks.key_mask = {data_or_placeholder(mask.const_data_ptr()),
                      DType::kFloat32,  // ignored: bytes
                      {call.shapes.batch, packed ? mask.size(0) : mask.size(1)},
                      {packed ? 0 : s[0], packed ? s[0] : s[1]}};
  }
  if (optional.seqused) {
    masks.seqused = int64_data(*optional.seqused);
  }
  if (optional.dropout_seed) {
    masks.dropout_state = int64_data(*optional.dropout_seed);
  }
  return masks;
}

/// Threads, stream and scratch memory of one pass, all torch's.
class TorchContext {
 public:
  TorchContext(const Call& call, Pass pass, const Tensor& like)
      : bytes_(call.plan.workspace_bytes(pass)),
        workspace_(new_workspace(like, bytes_)),
        stream_(current_stream(like)) {}

  Context context() const {
    return {.parallel_for = &threads_,
            .workspace = {static_cast<std::byte*>(workspace_.mutable_data_ptr()),
                          static_cast<std::size_t>(bytes_)},
            .stream = stream_};
  }

 private:
  TorchParallelFor threads_;
  std::int64_t bytes_;
  Tensor workspace_;
  void* stream_;
};

/// New tensors that forward fills, and their views.
struct Results {
  Results(const Call& call, const Tensor& query)
      : out(new_empty(query, call.inputs.query.shape, call.out_dtype())),
        lse(new_empty(query, lse_shape(call.inputs.query, call.layout), call.rows_dtype())) {}

  Tensor out;
  Tensor lse;
};

ForwardTensors forward_tensors(const Call& call, const Tensor& query, const Tensor& key,
                               const Tensor& value, const OptionalTensors& optional,
                               const Results& results) {
  ForwardTensors tensors;
  tensors.query = token_view(call.inputs.query, query, call.layout, call.shapes.dtype);
  tensors.key = token_view(call.inputs.key, key, call.layout, call.shapes.dtype);
  tensors.value = token_view(call.inputs.value, value, call.layout, call.shapes.dtype);
  if (call.has_class_rows()) {
    tensors.class_key = class_row_view("class_key", *optional.class_key, call);
    tensors.class_value = class_row_view("class_value", *optional.class_value, call);
  }
  tensors.masks = masks_of(optional, call);
  tensors.out = new_token_view(results.out, call.layout, call.out_dtype());
  tensors.lse = new_row_view(results.lse, call.rows_dtype());
  return tensors;
}

std::tuple<Tensor, Tensor> forward_op(const Tensor& query, const Tensor& key, const Tensor& value,
                                      const std::optional<Tensor>& key_mask,
                                      const std::optional<Tensor>& seqused,
                                      const std::optional<Tensor>& cu_seqlens,
                                      const std::optional<Tensor>& windows,
                                      const std::optional<Tensor>& dropout_seed,
                                      const std::optional<Tensor>& scale_tensor,
                                      std::optional<double> scale, std::optional<double> out_scale,
                                      double dropout_p, const Ints& packed) {
  const OptionalTensors optional{key_mask, seqused, cu_seqlens, windows, dropout_seed};
  const CallOptions options = unpack(scale_of(scale_tensor, scale), out_scale, dropout_p, packed);
  const Call call = make_call(options, query, key, value, optional, nullptr);
  Results results(call, query);
  const TorchContext context(call, Pass::kForward, query);
  if (call.has_sequences()) {
    forward(call.plan, forward_tensors(call, query, key, value, optional, results),
            context.context());
  }
  return {std::move(results.out), std::move(results.lse)};
}

using Saved = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Saved forward_saving(const Tensor& query, const Tensor& key, const Tensor& value,
                     const OptionalTensors& optional, const CallOptions& options) {
  const Call call = make_call(options, query, key, value, optional, nullptr);
  const Shapes& shapes = call.shapes;
  const DType rows_dtype = call.rows_dtype();
  const std::int64_t rows = call.plan.needs_branch_outputs() ? call.plan.branch_rows() : 0;
  Results results(call, query);
  Tensor lse_residual = new_empty(query, lse_shape(call.inputs.query, call.layout), rows_dtype);
  Tensor branch_out =
      new_empty(query, {shapes.batch, shapes.num_heads, rows, shapes.head_dim}, rows_dtype);
  Tensor branch_lse = new_empty(query, {shapes.batch, shapes.num_heads, rows, 2}, rows_dtype);
  ForwardTensors tensors = forward_tensors(call, query, key, value, optional, results);
  tensors.lse_residual = new_row_view(lse_residual, rows_dtype);
  if (rows > 0) {
    tensors.branch_out = new_branch_view(branch_out, rows_dtype);
    tensors.branch_lse = new_branch_view(branch_lse, rows_dtype);
  }
  const TorchContext context(call, Pass::kForward, query);
  if (call.has_sequences()) {
    forward(call.plan, tensors, context.context());
  }
  return {std::move(results.out), std::move(results.lse), std::move(lse_residual),
          std::move(branch_out), std::move(branch_lse)};
}

Saved forward_saving_op(const Tensor& query, const Tensor& key, const Tensor& value,
                        const std::optional<Tensor>& key_mask, const std::optional<Tensor>& seqused,
                        const std::optional<Tensor>& cu_seqlens,
                        const std::optional<Tensor>& windows,
                        const std::optional<Tensor>& dropout_seed,
                        const std::optional<Tensor>& scale_tensor, std::optional<double> scale,
                        std::optional<double> out_scale, double dropout_p, const Ints& packed) {
  return forward_saving(query, key, value, {key_mask, seqused, cu_seqlens, windows, dropout_seed},
                        unpack(scale_of(scale_tensor, scale), out_scale, dropout_p, packed));
}

Saved forward_class_rows_op(const Tensor& query, const Tensor& key, const Tensor& value,
                            const Tensor& class_key, const Tensor& class_value,
                            const std::optional<Tensor>& seqused, const Tensor& windows,
                            const std::optional<Tensor>& dropout_seed, std::optional<double> scale,
                            std::optional<double> out_scale, double dropout_p, const Ints& packed) {
  const std::optional<Tensor> none;
  const std::optional<Tensor> given = windows;
  return forward_saving(query, key, value,
                        {none, seqused, none, given, dropout_seed, &class_key, &class_value},
                        unpack(scale, out_scale, dropout_p, packed));
}

/// What forward_saving returned.
struct SavedTensors {
  const Tensor& out;
  const Tensor& lse;
  const Tensor& lse_residual;
  const Tensor& branch_out;
  const Tensor& branch_lse;
};

/// The last two are undefined unless keys come by class rows; dkey and dvalue are then without what
/// other shards give, and not rounded.
Saved backward(const Tensor& dout_given, const std::optional<Tensor>& dlse, const Tensor& query,
               const Tensor& key, const Tensor& value, const SavedTensors& saved,
               const OptionalTensors& optional, const CallOptions& options) {
  const auto& [out, lse, lse_residual, branch_out, branch_lse] = saved;
  // Gradients may be expanded (out.sum()): only then a copy is made.
  const Tensor dout = dout_given.sizes().back() > 1 && dout_given.strides().back() != 1
                          ? torch::stable::contiguous(dout_given)
                          : dout_given;
  const Call call = make_call(options, query, key, value, optional, &dout);
  const Layout layout = call.layout;
  const DType dtype = call.shapes.dtype;
  const DType rows_dtype = call.rows_dtype();
  Tensor dquery = new_empty(query, call.inputs.query.shape, dtype);
  const DType dkey_dtype = call.has_class_rows() ? rows_dtype : dtype;
  Tensor dkey = new_empty(key, call.inputs.key.shape, dkey_dtype);
  Tensor dvalue = new_empty(value, call.inputs.value.shape, dkey_dtype);
  Tensor dclass_key;
  Tensor dclass_value;

  BackwardTensors tensors;
  tensors.dout = token_view(info_of("dout", dout), dout, layout, call.out_dtype());
  if (dlse) {
    tensors.dlse = row_view(*dlse, rows_dtype);
  }
  tensors.query = token_view(call.inputs.query, query, layout, dtype);
  tensors.key = token_view(call.inputs.key, key, layout, dtype);
  tensors.value = token_view(call.inputs.value, value, layout, dtype);
  tensors.out = token_view(info_of("out", out), out, layout, call.out_dtype());
  tensors.lse = row_view(lse, rows_dtype);
  tensors.lse_residual = row_view(lse_residual, rows_dtype);
  if (call.plan.needs_branch_outputs()) {
    tensors.branch_out = branch_view(branch_out, rows_dtype);
    tensors.branch_lse = branch_view(branch_lse, rows_dtype);
  }
  tensors.masks = masks_of(optional, call);
  tensors.dquery = new_token_view(dquery, layout, dtype);
  tensors.dkey = new_token_view(dkey, layout, dkey_dtype);
  tensors.dvalue = new_token_view(dvalue, layout, dkey_dtype);
  if (call.has_class_rows()) {
    tensors.class_key = class_row_view("class_key", *optional.class_key, call);
    tensors.class_value = class_row_view("class_value", *optional.class_value, call);
    const std::vector<std::int64_t> shape = {call.shapes.batch, call.plan.class_row_count(),
                                             call.shapes.head_dim};
    dclass_key = new_empty(key, shape, rows_dtype);
    dclass_value = new_empty(key, shape, rows_dtype);
    tensors.dclass_key = new_class_row_view(dclass_key, rows_dtype);
    tensors.dclass_value = new_class_row_view(dclass_value, rows_dtype);
  }
  const TorchContext context(call, Pass::kBackward, query);
  if (call.has_sequences()) {
    dilated::backward(call.plan, tensors, context.context());
  }
  return {std::move(dquery), std::move(dkey), std::move(dvalue), std::move(dclass_key),
          std::move(dclass_value)};
}

std::tuple<Tensor, Tensor, Tensor> backward_op(
    const Tensor& dout, const std::optional<Tensor>& dlse, const Tensor& query, const Tensor& key,
    const Tensor& value, const Tensor& out, const Tensor& lse, const Tensor& lse_residual,
    const Tensor& branch_out, const Tensor& branch_lse, const std::optional<Tensor>& key_mask,
    const std::optional<Tensor>& seqused, const std::optional<Tensor>& cu_seqlens,
    const std::optional<Tensor>& windows, const std::optional<Tensor>& dropout_seed,
    const std::optional<Tensor>& scale_tensor, std::optional<double> scale,
    std::optional<double> out_scale, double dropout_p, const Ints& packed) {
  auto [dquery, dkey, dvalue, none, nothing] =
      backward(dout, dlse, query, key, value, {out, lse, lse_residual, branch_out, branch_lse},
               {key_mask, seqused, cu_seqlens, windows, dropout_seed},
               unpack(scale_of(scale_tensor, scale), out_scale, dropout_p, packed));
  return {std::move(dquery), std::move(dkey), std::move(dvalue)};
}

Saved backward_class_rows_op(const Tensor& dout, const std::optional<Tensor>& dlse,
                             const Tensor& query, const Tensor& key, const Tensor& value,
                             const Tensor& class_key, const Tensor& class_value, const Tensor& out,
                             const Tensor& lse, const Tensor& lse_residual,
                             const Tensor& branch_out, const Tensor& branch_lse,
                             const std::optional<Tensor>& seqused, const Tensor& windows,
                             const std::optional<Tensor>& dropout_seed, std::optional<double> scale,
                             std::optional<double> out_scale, double dropout_p,
                             const Ints& packed) {
  const std::optional<Tensor> none;
  const std::optional<Tensor> given = windows;
  return backward(dout, dlse, query, key, value, {out, lse, lse_residual, branch_out, branch_lse},
                  {none, seqused, none, given, dropout_seed, &class_key, &class_value},
                  unpack(scale, out_scale, dropout_p, packed));
}

}  // namespace

void define_attention(Library& library) {
  const std::string inputs = "Tensor query, Tensor key, Tensor value, ";
  const std::string rest = std::string(kOptionalSchema) + ", " + kOptionsSchema;
  const std::string saved =
      "Tensor out, Tensor lse, Tensor lse_residual, Tensor branch_out, Tensor branch_lse";
  library.def(("forward(" + inputs + rest + ") -> (Tensor out, Tensor lse)").c_str());
  library.def(("forward_saving(" + inputs + rest + ") -> (" + saved + ")").c_str());
  library.def(("backward(Tensor dout, Tensor? dlse, " + inputs + saved + ", " + rest +
               ") -> (Tensor dquery, Tensor dkey, Tensor dvalue)")
                  .c_str());
  const std::string shard = inputs + "Tensor class_key, Tensor class_value, ";
  const std::string of_shard =
      std::string("Tensor? seqused, Tensor windows, Tensor? dropout_seed, ") + kOptionsSchema;
  library.def(("forward_class_rows(" + shard + of_shard + ") -> (" + saved + ")").c_str());
  library.def(("backward_class_rows(Tensor dout, Tensor? dlse, " + shard + saved + ", " + of_shard +
               ") -> (Tensor dquery, Tensor dkey, Tensor dvalue, Tensor dclass_key, Tensor "
               "dclass_value)")
                  .c_str());
}

void implement_attention(Library& library) {
  library.impl("forward", TORCH_BOX(&Typed<&forward_op>::call));
  library.impl("forward_saving", TORCH_BOX(&Typed<&forward_saving_op>::call));
  library.impl("backward", TORCH_BOX(&Typed<&backward_op>::call));
  library.impl("forward_class_rows", TORCH_BOX(&Typed<&forward_class_rows_op>::call));
  library.impl("backward_class_rows", TORCH_BOX(&Typed<&backward_class_rows_op>::call));
}

}  // namespace dilated::binding
