// Rules of semantics §11's negative tests that concern tensors; every message names the argument.
#include "bindings/torch/inputs.h"

#include <algorithm>
#include <utility>

#include "dilated/error.h"

namespace dilated::binding {
namespace {

std::string text_of(const std::vector<std::int64_t>& shape) {
  std::string text = "(";
  for (std::size_t i = 0; i < shape.size(); ++i) {
    text += (i == 0 ? "" : ", ") + std::to_string(shape[i]);
  }
  return text + (shape.size() == 1 ? ",)" : ")");
}

const char* dimensions_of(Layout layout) {
  switch (layout) {
    case Layout::kBshd:
      return "4 dimensions (batch, seqlen, heads, head_dim)";
    case Layout::kBhsd:
      return "4 dimensions (batch, heads, seqlen, head_dim)";
    case Layout::kShd:
      break;
  }
  return "3 dimensions (total, heads, head_dim)";
}

/// Core order of the user's sizes.
struct Extents {
  std::int64_t batch, seqlen, heads, head_dim;
};

Extents extents_of(const TensorInfo& tensor, Layout layout) {
  const auto view = token_view<const void>(tensor, layout, DType::kFloat32, nullptr);
  return {view.shape[0], view.shape[1], view.shape[2], view.shape[3]};
}

std::vector<std::int64_t> user_shape(const Extents& e, Layout layout) {
  switch (layout) {
    case Layout::kBshd:
      return {e.batch, e.seqlen, e.heads, e.head_dim};
    case Layout::kBhsd:
      return {e.batch, e.heads, e.seqlen, e.head_dim};
    case Layout::kShd:
      break;
  }
  return {e.seqlen, e.heads, e.head_dim};
}

void require_rank(const TensorInfo& tensor, Layout layout) {
  const std::size_t rank = layout == Layout::kShd ? 3 : 4;
  if (tensor.shape.size() != rank) {
    reject(tensor.name, dimensions_of(layout), "shape " + text_of(tensor.shape));
  }
}

void require_like_query(const TensorInfo& tensor, const TensorInfo& query) {
  if (tensor.dtype != query.dtype) {
    reject(tensor.name, "query's dtype " + query.dtype, tensor.dtype);
  }
  if (tensor.device != query.device) {
    reject(tensor.name, "query's device " + query.device, tensor.device);
  }
}

void require_contiguous_rows(const TensorInfo& tensor) {
  const bool empty = std::find(tensor.shape.begin(), tensor.shape.end(), 0) != tensor.shape.end();
  if (!empty && tensor.shape.back() > 1 && tensor.strides.back() != 1) {
    reject(tensor.name, "a contiguous last dimension",
           "stride " + std::to_string(tensor.strides.back()), "call .contiguous()");
  }
}

/// Small integer inputs.
void require_int64(const TensorInfo& tensor, const std::string& device, std::size_t rank, bool fits,
                   const std::string& expected) {
  if (tensor.dtype != "int64" || tensor.device != device || tensor.shape.size() != rank || !fits) {
    reject(tensor.name, expected,
           tensor.dtype + " " + text_of(tensor.shape) + " on " + tensor.device);
  }
  require_contiguous_rows(tensor);
}

void check_key_mask(const TensorInfo& mask, const Inputs& inputs, const Extents& key,
                    Layout layout) {
  const std::vector<std::int64_t> shape = layout == Layout::kShd
                                              ? std::vector<std::int64_t>{key.seqlen}
                                              : std::vector<std::int64_t>{key.batch, key.seqlen};
  if (mask.dtype != "bool" || mask.shape != shape) {
    reject<Unsupported>("key_mask", "bool of shape " + text_of(shape),
                        mask.dtype + " of shape " + text_of(mask.shape),
                        "True = key takes part; no other form of mask is supported");
  }
  if (mask.device != inputs.query.device) {
    reject("key_mask", "query's device " + inputs.query.device, mask.device);
  }
}

/// The small inputs: lengths and windows are read while the call is prepared, seqused and the
/// dropout state where the call runs.
void check_lengths(const Inputs& inputs, std::int64_t batch, Layout layout, double dropout_p) {
  const std::string& device = inputs.query.device;
  std::int64_t sequences = batch;
  if (inputs.cu_seqlens) {
    const auto& shape = inputs.cu_seqlens->shape;
    require_int64(*inputs.cu_seqlens, "cpu", 1, !shape.empty() && shape[0] >= 1,
                  "a 1-D int64 CPU tensor with at least one entry");
    sequences = shape[0] - 1;
  }
  if (inputs.windows) {
    const auto& shape = inputs.windows->shape;
    const bool fits = shape.size() == 2 && shape[1] == 5 &&
                      (layout == Layout::kShd || shape[0] == batch) && !inputs.cu_seqlens;
    require_int64(*inputs.windows, "cpu", 2, fits,
                  "an int64 CPU tensor (sequences, 5), without cu_seqlens");
    sequences = shape[0];
  }
  if (inputs.seqused) {
    const auto& shape = inputs.seqused->shape;
    require_int64(*inputs.seqused, device, 1, !shape.empty() && shape[0] == sequences,
                  "a 1-D int64 tensor on " + device + " with one length per sequence, " +
                      std::to_string(sequences));
  }
  if (inputs.dropout_seed) {
    const auto& shape = inputs.dropout_seed->shape;
    require_int64(*inputs.dropout_seed, device, 1, !shape.empty() && shape[0] == 2,
                  "a 1-D int64 tensor (seed, offset) on " + device);
  } else if (dropout_p > 0.0) {
    reject("dropout_seed", "(seed, offset) with dropout_p > 0", "none");
  }
}

}  // namespace

std::vector<std::string> layout_names() { return {"bshd", "bhsd", "shd"}; }

Layout parse_layout(std::string_view name) {
  if (name == "bshd") {
    return Layout::kBshd;
  }
  if (name == "bhsd") {
    return Layout::kBhsd;
  }
  if (name == "shd") {
    return Layout::kShd;
  }
  reject("layout", "one of bshd, bhsd, shd", std::string(name));
}

DType parse_dtype(std::string_view argument, std::string_view name) {
  for (const DType dtype : {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16}) {
    if (name_of(dtype) == name) {
      return dtype;
    }
  }
  reject(std::string(argument), "dtype float32, float64, bfloat16 or float16", std::string(name));
}

DeviceSpec parse_device(std::string_view argument, std::string_view name) {
  if (name == "cpu") {
    return {Device::kCpu};
  }
  if (name == "cuda") {
    return {Device::kCuda};
  }
  if (name.substr(0, 5) == "cuda:") {
    return {Device::kCuda, std::stoll(std::string(name.substr(5)))};
  }
  reject(std::string(argument), "device cpu or cuda", std::string(name));
}

Shapes shapes_of(const Inputs& inputs, Layout layout, double dropout_p) {
  if (inputs.cu_seqlens && layout != Layout::kShd) {
    reject("layout", "'shd' together with cu_seqlens",
           layout == Layout::kBshd ? "'bshd'" : "'bhsd'",
           "packed tensors are (total, heads, head_dim)");
  }
  for (const TensorInfo* tensor : {&inputs.query, &inputs.key, &inputs.value}) {
    require_rank(*tensor, layout);
  }
  const DType dtype = parse_dtype("query", inputs.query.dtype);
  const DeviceSpec device = parse_device("query", inputs.query.device);
  const Extents q = extents_of(inputs.query, layout);
  const Extents k = extents_of(inputs.key, layout);
  const Extents expected_key = {q.batch, inputs.windows ? k.seqlen : q.seqlen, k.heads, q.head_dim};
  for (const TensorInfo* tensor : {&inputs.key, &inputs.value}) {
    require_like_query(*tensor, inputs.query);
    const auto expected = user_shape(expected_key, layout);
    if (tensor->shape != expected) {
      reject(tensor->name, "shape " + text_of(expected), text_of(tensor->shape),
             "batch, seqlen and head_dim as query; key and value have the same heads");
    }
  }
  for (const TensorInfo* tensor : {&inputs.query, &inputs.key, &inputs.value}) {
    require_contiguous_rows(*tensor);
  }
  if (inputs.key_mask) {
    check_key_mask(*inputs.key_mask, inputs, k, layout);
  }
  check_lengths(inputs, q.batch, layout, dropout_p);
  Shapes shapes;
  shapes.device = device;
  shapes.dtype = dtype;
  shapes.batch = q.batch;
  shapes.seqlen = q.seqlen;
  shapes.num_heads = q.heads;
  shapes.num_kv_heads = k.heads;
  shapes.head_dim = q.head_dim;
  shapes.has_key_mask = inputs.key_mask.has_value();
  shapes.has_seqused = inputs.seqused.has_value();
  return shapes;
}

std::vector<std::int64_t> lse_shape(const TensorInfo& query, Layout layout) {
  const Extents e = extents_of(query, layout);
  if (layout == Layout::kShd) {
    return {e.heads, e.seqlen};
  }
  return {e.batch, e.heads, e.seqlen};
}

}  // namespace dilated::binding
