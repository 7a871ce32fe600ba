// Checks of a call's tensors, before any memory is touched: shapes, strides, dtypes, devices ->
// Shapes. The same code serves real tensors and, through the operator `check`, fake ones.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "dilated/options.h"
#include "dilated/tensor_view.h"

namespace dilated::binding {

/// What can be said about a tensor without its memory.
struct TensorInfo {
  std::string name;    // as in the public API
  std::string dtype;   // "float32", ...
  std::string device;  // "cpu", "cuda:0", ...
  std::vector<std::int64_t> shape;
  std::vector<std::int64_t> strides;  // in elements
};

/// Order of the user's dimensions. kShd is packed: (total, heads, head_dim).
enum class Layout { kBshd, kBhsd, kShd };

/// The tensors of one forward call.
struct Inputs {
  TensorInfo query;
  TensorInfo key;
  TensorInfo value;
  std::optional<TensorInfo> key_mask;
  std::optional<TensorInfo> seqused;
  std::optional<TensorInfo> cu_seqlens;
  // (sequences, 5): length, then begin and end of the query rows' and of the key rows' positions
  std::optional<TensorInfo> windows;
  std::optional<TensorInfo> dropout_seed;
};

/// Names of the layouts.
std::vector<std::string> layout_names();
/// Throws InvalidProblem for another name.
Layout parse_layout(std::string_view name);

/// Throws InvalidProblem for a dtype that is none of the four.
DType parse_dtype(std::string_view argument, std::string_view name);
/// Kind and index of "cpu", "cuda" or "cuda:1". Throws InvalidProblem for another device.
DeviceSpec parse_device(std::string_view argument, std::string_view name);

/// Compares all tensors and returns the shapes they have in common, without what `cu_seqlens` and
/// `windows` hold. Throws InvalidProblem naming the tensor, or Unsupported for another form of
/// mask.
Shapes shapes_of(const Inputs& inputs, Layout layout, double dropout_p);

/// Shape and strides of `tensor` in the core's order (batch, seqlen, heads, head_dim); no data.
template <typename Void>
StridedView<Void, 4> token_view(const TensorInfo& tensor, Layout layout, DType dtype, Void* data);

/// Shape of log-sum-exps in the user's layout: (batch, heads, seqlen), packed (heads, total).
std::vector<std::int64_t> lse_shape(const TensorInfo& query, Layout layout);

template <typename Void>
StridedView<Void, 4> token_view(const TensorInfo& tensor, Layout layout, DType dtype, Void* data) {
  const auto& n = tensor.shape;
  const auto& s = tensor.strides;
  switch (layout) {
    case Layout::kBshd:
      return {data, dtype, {n[0], n[1], n[2], n[3]}, {s[0], s[1], s[2], s[3]}};
    case Layout::kBhsd:
      return {data, dtype, {n[0], n[2], n[1], n[3]}, {s[0], s[2], s[1], s[3]}};
    case Layout::kShd:
      break;
  }
  return {data, dtype, {1, n[0], n[1], n[2]}, {0, s[0], s[1], s[2]}};
}

}  // namespace dilated::binding
