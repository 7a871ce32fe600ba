// The core's views of torch tensors, in the core's order of dimensions.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "dilated/tensor_view.h"

#include "bindings/torch/inputs.h"
#include "bindings/torch/stable_abi.h"

namespace dilated::binding {

/// Non-null even for tensors without elements, where a null pointer would read as "not given".
template <typename Void>
Void* data_or_placeholder(Void* data) {
  static std::array<std::byte, 64> placeholder;
  return data != nullptr ? data : placeholder.data();
}

/// What is read: any strides.
inline ConstTensorView token_view(const TensorInfo& info, const Tensor& tensor, Layout layout,
                                  DType dtype) {
  ConstTensorView view =
      token_view<const void>(info, layout, dtype, data_or_placeholder(tensor.const_data_ptr()));
  if (tensor.numel() == 0) {  // torch leaves any strides on a tensor without elements
    view.strides[3] = 1;
  }
  return view;
}

/// What is written: a new contiguous tensor.
inline TensorView new_token_view(const Tensor& tensor, Layout layout, DType dtype) {
  return token_view<void>(info_of("", tensor), layout, dtype,
                          data_or_placeholder(tensor.mutable_data_ptr()));
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

inline ConstRowView row_view(const Tensor& tensor, DType dtype) {
  return row_view<const void>(tensor, tensor.const_data_ptr(), dtype);
}

inline RowView new_row_view(const Tensor& tensor, DType dtype) {
  return row_view<void>(tensor, tensor.mutable_data_ptr(), dtype);
}

/// (batch, heads, rows, width) of saved branch results.
template <typename Void>
StridedView<Void, 4> branch_view(const Tensor& tensor, Void* data, DType dtype) {
  const auto n = tensor.sizes();
  const auto s = tensor.strides();
  return {data_or_placeholder(data), dtype, {n[0], n[1], n[2], n[3]}, {s[0], s[1], s[2], s[3]}};
}

inline StridedView<const void, 4> branch_view(const Tensor& tensor, DType dtype) {
  return branch_view<const void>(tensor, tensor.const_data_ptr(), dtype);
}

inline StridedView<void, 4> new_branch_view(const Tensor& tensor, DType dtype) {
  return branch_view<void>(tensor, tensor.mutable_data_ptr(), dtype);
}

/// dtype of log-sum-exps and of results that are not rounded.
constexpr DType accumulation_dtype(DType dtype) {
  return dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
}

}  // namespace dilated::binding
