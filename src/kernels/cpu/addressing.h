// Where the rows of the caller's tensors lie.
#pragma once

#include <cstddef>
#include <cstdint>

#include "dilated/tensor_view.h"

namespace dilated::cpu {

/// Address of a row of head_dim elements; `at` is the row in the tensor (RowSpan::row).
inline const std::byte* row_at(const ConstTensorView& view, std::int64_t batch, std::int64_t at,
                               std::int64_t head) {
  return static_cast<const std::byte*>(view.data) +
         (batch * view.strides[0] + at * view.strides[1] + head * view.strides[2]) *
             size_of(view.dtype);
}

inline std::byte* row_at(const TensorView& view, std::int64_t batch, std::int64_t at,
                         std::int64_t head) {
  return static_cast<std::byte*>(view.data) +
         (batch * view.strides[0] + at * view.strides[1] + head * view.strides[2]) *
             size_of(view.dtype);
}

/// Row of a float32 (batch, heads, rows, columns) view of saved branch results.
inline float* saved_row(const TensorView& view, std::int64_t batch, std::int64_t head,
                        std::int64_t row) {
  return static_cast<float*>(view.data) + batch * view.strides[0] + head * view.strides[1] +
         row * view.strides[2];
}

inline const float* saved_row(const ConstTensorView& view, std::int64_t batch, std::int64_t head,
                              std::int64_t row) {
  return static_cast<const float*>(view.data) + batch * view.strides[0] + head * view.strides[1] +
         row * view.strides[2];
}

/// Entry of a float32 (batch, heads, rows) view.
inline float& item_at(const RowView& view, std::int64_t batch, std::int64_t head,
                      std::int64_t row) {
  return static_cast<float*>(
      view.data)[batch * view.strides[0] + head * view.strides[1] + row * view.strides[2]];
}

inline float item_at(const ConstRowView& view, std::int64_t batch, std::int64_t head,
                     std::int64_t row) {
  return static_cast<const float*>(
      view.data)[batch * view.strides[0] + head * view.strides[1] + row * view.strides[2]];
}

}  // namespace dilated::cpu
