// Elements of the caller's tensors on the device.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "dilated/tensor_view.h"

namespace dilated::gpu {

/// Neighbouring elements that one thread loads or stores at once.
inline constexpr int kPieceColumns = 8;

template <typename Element>
inline constexpr DType kDTypeOf = std::is_same_v<Element, float>           ? DType::kFloat32
                                  : std::is_same_v<Element, __nv_bfloat16> ? DType::kBFloat16
                                                                           : DType::kFloat16;

__device__ inline std::int64_t bytes_of(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

__device__ inline float load_element(const std::byte* row, DType dtype, int column) {
  switch (dtype) {
    case DType::kBFloat16:
      return __bfloat162float(reinterpret_cast<const __nv_bfloat16*>(row)[column]);
    case DType::kFloat16:
      return __half2float(reinterpret_cast<const __half*>(row)[column]);
    default:
      return reinterpret_cast<const float*>(row)[column];
  }
}

__device__ inline void store_element(std::byte* row, DType dtype, int column, float value) {
  switch (dtype) {
    case DType::kBFloat16:
      reinterpret_cast<__nv_bfloat16*>(row)[column] = __float2bfloat16_rn(value);
      break;
    case DType::kFloat16:
      reinterpret_cast<__half*>(row)[column] = __float2half_rn(value);
      break;
    default:
      reinterpret_cast<float*>(row)[column] = value;
  }
}

/// Whether the columns from `column` on are a whole piece at an address that can be read at once.
__device__ inline bool is_whole_piece(const std::byte* row, DType dtype, int column, int columns) {
  const auto address =
      reinterpret_cast<std::uintptr_t>(row) + static_cast<std::uintptr_t>(column * bytes_of(dtype));
  return column + kPieceColumns <= columns && address % 16 == 0;
}

/// Columns from `column` on; zeros beyond `columns`.
__device__ inline void load_piece(const std::byte* row, DType dtype, int column, int columns,
                                  float (&to)[kPieceColumns]) {
  if (!is_whole_piece(row, dtype, column, columns)) {
    for (int i = 0; i < kPieceColumns; ++i) {
      to[i] = column + i < columns ? load_element(row, dtype, column + i) : 0.0f;
    }
    return;
  }
  uint4 words[2];
  const auto* const from = reinterpret_cast<const uint4*>(row + column * bytes_of(dtype));
  words[0] = from[0];
  words[1] = dtype == DType::kFloat32 ? from[1] : uint4{};
#pragma unroll
  for (int i = 0; i < kPieceColumns; ++i) {
    to[i] = load_element(reinterpret_cast<const std::byte*>(words), dtype, i);
  }
}

__device__ inline void store_piece(std::byte* row, DType dtype, int column, int columns,
                                   const float (&from)[kPieceColumns]) {
  if (!is_whole_piece(row, dtype, column, columns)) {
    for (int i = 0; i < kPieceColumns && column + i < columns; ++i) {
      store_element(row, dtype, column + i, from[i]);
    }
    return;
  }
  uint4 words[2];
#pragma unroll
  for (int i = 0; i < kPieceColumns; ++i) {
    store_element(reinterpret_cast<std::byte*>(words), dtype, i, from[i]);
  }
  auto* const to = reinterpret_cast<uint4*>(row + column * bytes_of(dtype));
  to[0] = words[0];
  if (dtype == DType::kFloat32) {
    to[1] = words[1];
  }
}

template <typename Element>
__device__ inline Element element_of(float value) {
  if constexpr (std::is_same_v<Element, float>) {
    return value;
  } else if constexpr (std::is_same_v<Element, __nv_bfloat16>) {
    return __float2bfloat16_rn(value);
  } else {
    return __float2half_rn(value);
  }
}

__device__ inline float float_of(float value) { return value; }
__device__ inline float float_of(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ inline float float_of(__half value) { return __half2float(value); }

/// Rows of one (batch, head) of a tensor.
template <typename Byte>
struct Rows {
  Byte* data;
  std::int64_t stride;  // bytes
  DType dtype;

  __device__ Byte* row(std::int64_t at) const { return data + at * stride; }
};

template <typename Void>
__device__ auto rows_of(const StridedView<Void, 4>& view, std::int64_t batch, std::int64_t head) {
  using Byte = std::conditional_t<std::is_const_v<Void>, const std::byte, std::byte>;
  const std::int64_t size = bytes_of(view.dtype);
  return Rows<Byte>{
      static_cast<Byte*>(view.data) + (batch * view.strides[0] + head * view.strides[2]) * size,
      view.strides[1] * size, view.dtype};
}

/// Rows of one (batch, head) of saved branch results, which are (batch, heads, rows, columns).
template <typename Void>
__device__ auto saved_rows(const StridedView<Void, 4>& view, std::int64_t batch,
                           std::int64_t head) {
  using Float = std::conditional_t<std::is_const_v<Void>, const float, float>;
  struct Saved {
    Float* data;
    std::int64_t stride;
    __device__ Float* row(std::int64_t at) const { return data + at * stride; }
  };
  return Saved{static_cast<Float*>(view.data) + batch * view.strides[0] + head * view.strides[1],
               view.strides[2]};
}

/// Entry of a float32 (batch, heads, rows) view.
template <typename Void>
__device__ auto& item_at(const StridedView<Void, 3>& view, std::int64_t batch, std::int64_t head,
                         std::int64_t row) {
  using Float = std::conditional_t<std::is_const_v<Void>, const float, float>;
  return static_cast<Float*>(
      view.data)[batch * view.strides[0] + head * view.strides[1] + row * view.strides[2]];
}

}  // namespace dilated::gpu
