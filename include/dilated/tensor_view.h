// Non-owning strided views of the caller's memory: how tensors enter the core.
// Strides count elements, so any layout (bshd, bhsd, packed qkv) is a view and never a copy.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string_view>

namespace dilated {

enum class DType { kFloat32, kFloat64, kBFloat16, kFloat16 };
enum class Device { kCpu, kCuda };

/// "float32", "float64", "bfloat16" or "float16".
std::string_view name_of(DType dtype);
/// "cpu" or "cuda".
std::string_view name_of(Device device);
/// Bytes of one element.
std::int64_t size_of(DType dtype);

/// A strided array of `kRank` dimensions; `Void` is `void` or `const void`.
template <typename Void, std::size_t kRank>
struct StridedView {
  Void* data = nullptr;
  DType dtype = DType::kFloat32;
  std::array<std::int64_t, kRank> shape{};
  std::array<std::int64_t, kRank> strides{};  // in elements

  /// False for an optional tensor that was not given.
  constexpr bool defined() const { return data != nullptr; }
};

/// (batch, seqlen, heads, head_dim), last dimension contiguous.
using TensorView = StridedView<void, 4>;
using ConstTensorView = StridedView<const void, 4>;
/// (batch, heads, rows): log-sum-exps and their gradients.
using RowView = StridedView<void, 3>;
using ConstRowView = StridedView<const void, 3>;

}  // namespace dilated
