// Test tensors: addressing, conversion, comparison.
#include "tests/support/tensor.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

#include <fmt/format.h>

#include "src/half.h"

namespace dilated::testing {
namespace {

template <typename Value>
Value load(const std::byte* from) {
  Value value;
  std::memcpy(&value, from, sizeof(Value));
  return value;
}

template <typename Value>
void store(std::byte* to, Value value) {
  std::memcpy(to, &value, sizeof(Value));
}

std::uint64_t bits_of(double value) { return std::bit_cast<std::uint64_t>(value); }

std::string place(std::int64_t i, std::int64_t j, std::int64_t k, std::int64_t c) {
  return fmt::format("[{}][{}][{}][{}]", i, j, k, c);
}

}  // namespace

double round_to(DType dtype, double value) {
  const auto single = static_cast<float>(value);
  switch (dtype) {
    case DType::kFloat64:
      return value;
    case DType::kFloat32:
      return static_cast<double>(single);
    case DType::kBFloat16:
      return static_cast<double>(float_of_bfloat16(bfloat16_of_float(single)));
    case DType::kFloat16:
      return static_cast<double>(float_of_float16(float16_of_float(single)));
  }
  return value;
}

Tensor::Tensor(DType dtype, const Shape& shape, Layout layout) : dtype_(dtype), shape_(shape) {
  const auto [n0, n1, n2, n3] = shape;
  switch (layout) {
    case Layout::kBshd:
      strides_ = {n1 * n2 * n3, n2 * n3, n3, 1};
      break;
    case Layout::kBhsd:
      strides_ = {n1 * n2 * n3, n3, n1 * n3, 1};
      break;
    case Layout::kGaps:
      strides_ = {n1 * (n2 * (n3 + 3) + 5) + 7, n2 * (n3 + 3) + 5, n3 + 3, 1};
      break;
  }
  const std::int64_t elements = layout == Layout::kGaps ? n0 * strides_[0] : n0 * n1 * n2 * n3;
  bytes_.assign(static_cast<std::size_t>(elements * size_of(dtype)), std::byte{0xFF});
}

bool Tensor::empty() const { return std::ranges::count(shape_, 0) > 0; }

std::int64_t Tensor::offset(std::int64_t i, std::int64_t j, std::int64_t k, std::int64_t c) const {
  return (i * strides_[0] + j * strides_[1] + k * strides_[2] + c) * size_of(dtype_);
}

double Tensor::at(std::int64_t i, std::int64_t j, std::int64_t k, std::int64_t c) const {
  const std::byte* from = bytes_.data() + offset(i, j, k, c);
  switch (dtype_) {
    case DType::kFloat64:
      return load<double>(from);
    case DType::kFloat32:
      return static_cast<double>(load<float>(from));
    case DType::kBFloat16:
      return static_cast<double>(float_of_bfloat16(load<std::uint16_t>(from)));
    case DType::kFloat16:
      return static_cast<double>(float_of_float16(load<std::uint16_t>(from)));
  }
  return 0.0;
}

void Tensor::set(std::int64_t i, std::int64_t j, std::int64_t k, std::int64_t c, double value) {
  std::byte* to = bytes_.data() + offset(i, j, k, c);
  const auto single = static_cast<float>(value);
  switch (dtype_) {
    case DType::kFloat64:
      return store(to, value);
    case DType::kFloat32:
      return store(to, single);
    case DType::kBFloat16:
      return store(to, bfloat16_of_float(single));
    case DType::kFloat16:
      return store(to, float16_of_float(single));
  }
}

void Tensor::fill(double value) {
  for_each([&](auto i, auto j, auto k, auto c) { set(i, j, k, c, value); });
}

// An empty std::vector may have no data; a view of an empty tensor may be undefined.
TensorView Tensor::view() { return {bytes_.data(), dtype_, shape_, strides_}; }
ConstTensorView Tensor::view() const { return {bytes_.data(), dtype_, shape_, strides_}; }

RowView Tensor::rows() {
  return {bytes_.data(),
          dtype_,
          {shape_[0], shape_[1], shape_[2]},
          {strides_[0], strides_[1], strides_[2]}};
}

ConstRowView Tensor::rows() const {
  return {bytes_.data(),
          dtype_,
          {shape_[0], shape_[1], shape_[2]},
          {strides_[0], strides_[1], strides_[2]}};
}

bool Tensor::gaps_are_untouched() const {
  std::vector<bool> is_element(bytes_.size(), false);
  for_each([&](auto i, auto j, auto k, auto c) {
    for (std::int64_t byte = 0; byte < size_of(dtype_); ++byte) {
      is_element[static_cast<std::size_t>(offset(i, j, k, c) + byte)] = true;
    }
  });
  for (std::size_t byte = 0; byte < bytes_.size(); ++byte) {
    if (!is_element[byte] && bytes_[byte] != std::byte{0xFF}) {
      return false;
    }
  }
  return true;
}

Tensor Tensor::converted(DType dtype, Layout layout) const {
  Tensor result(dtype, shape_, layout);
  for_each([&](auto i, auto j, auto k, auto c) { result.set(i, j, k, c, at(i, j, k, c)); });
  return result;
}

Tensor Tensor::slice(std::int64_t begin, std::int64_t end) const {
  Tensor result(dtype_, {shape_[0], end - begin, shape_[2], shape_[3]});
  result.for_each(
      [&](auto i, auto j, auto k, auto c) { result.set(i, j, k, c, at(i, begin + j, k, c)); });
  return result;
}

double max_error(const Tensor& a, const Tensor& b) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  if (a.shape() != b.shape()) {
    return kInfinity;
  }
  double worst = 0.0;
  a.for_each([&](auto i, auto j, auto k, auto c) {
    const double x = a.at(i, j, k, c);
    const double y = b.at(i, j, k, c);
    const double error = x == y ? 0.0 : std::abs(x - y);
    worst = std::isnan(error) ? kInfinity : std::max(worst, error);
  });
  return worst;
}

std::string difference(const Tensor& a, const Tensor& b, double tolerance) {
  if (a.shape() != b.shape()) {
    return "shapes differ";
  }
  std::string text;
  a.for_each([&](auto i, auto j, auto k, auto c) {
    const double x = a.at(i, j, k, c);
    const double y = b.at(i, j, k, c);
    // Written so that NaN fails.
    if (text.empty() && x != y && !(std::abs(x - y) <= tolerance * std::max(1.0, std::abs(y)))) {
      text = fmt::format("{}: {} against {}", place(i, j, k, c), x, y);
    }
  });
  return text;
}

std::string bit_difference(const Tensor& a, const Tensor& b) {
  if (a.shape() != b.shape() || a.dtype() != b.dtype()) {
    return "shapes or dtypes differ";
  }
  std::string text;
  a.for_each([&](auto i, auto j, auto k, auto c) {
    const double x = a.at(i, j, k, c);
    const double y = b.at(i, j, k, c);
    if (text.empty() && bits_of(x) != bits_of(y)) {
      text = fmt::format("{}: {:a} against {:a}", place(i, j, k, c), x, y);
    }
  });
  return text;
}

}  // namespace dilated::testing
