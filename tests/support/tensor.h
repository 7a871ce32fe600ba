// Owning test tensors in every dtype and layout, read and written as doubles.
// Memory starts as bytes 0xFF, which is NaN in every dtype: what is not written shows.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "dilated/tensor_view.h"

namespace dilated::testing {

/// Order of memory of a (batch, seqlen, heads, head_dim) tensor. `kGaps` leaves holes after rows
/// and heads.
enum class Layout { kBshd, kBhsd, kGaps };

/// Nearest value of `dtype`, as a double.
double round_to(DType dtype, double value);

class Tensor {
 public:
  using Shape = std::array<std::int64_t, 4>;

  Tensor() = default;
  Tensor(DType dtype, const Shape& shape, Layout layout = Layout::kBshd);

  DType dtype() const { return dtype_; }
  const Shape& shape() const { return shape_; }
  bool empty() const;

  double at(std::int64_t i, std::int64_t j, std::int64_t k, std::int64_t c = 0) const;
  /// Stores the nearest value of the dtype.
  void set(std::int64_t i, std::int64_t j, std::int64_t k, std::int64_t c, double value);
  void fill(double value);

  TensorView view();
  ConstTensorView view() const;
  /// For tensors of shape (batch, heads, rows, 1).
  RowView rows();
  ConstRowView rows() const;

  /// True if every byte outside the elements still is 0xFF.
  bool gaps_are_untouched() const;
  /// The same values in another dtype and layout.
  Tensor converted(DType dtype, Layout layout = Layout::kBshd) const;
  /// Rows [begin, end) of dimension 1.
  Tensor slice(std::int64_t begin, std::int64_t end) const;

  /// Calls body(i, j, k, c) for every element.
  template <typename Body>
  void for_each(const Body& body) const {
    for (std::int64_t i = 0; i < shape_[0]; ++i) {
      for (std::int64_t j = 0; j < shape_[1]; ++j) {
        for (std::int64_t k = 0; k < shape_[2]; ++k) {
          for (std::int64_t c = 0; c < shape_[3]; ++c) {
            body(i, j, k, c);
          }
        }
      }
    }
  }

 private:
  std::int64_t offset(std::int64_t i, std::int64_t j, std::int64_t k, std::int64_t c) const;

  DType dtype_ = DType::kFloat64;
  Shape shape_{};
  Shape strides_{};
  std::vector<std::byte> bytes_;
};

/// max |a - b|; infinity if shapes differ, if one is NaN, or if infinities do not agree.
double max_error(const Tensor& a, const Tensor& b);

/// Empty if |a - b| <= tolerance * max(1, |b|) everywhere, else where and by how much not.
std::string difference(const Tensor& a, const Tensor& b, double tolerance);

/// Empty if both hold the same bits, else the first place where not.
std::string bit_difference(const Tensor& a, const Tensor& b);

}  // namespace dilated::testing
