// Compares the views of one call with what they should be, before anything is written; every
// mismatch names the tensor.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <utility>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "dilated/error.h"
#include "dilated/tensor_view.h"

#include "src/overlap.h"

namespace dilated {

/// dtype of log-sum-exps and of results that are not rounded.
constexpr DType accumulation_dtype(DType dtype) {
  return dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
}

class ViewCheck {
 public:
  /// `alignment`: bytes that divide pointers and outer strides, or 0.
  explicit ViewCheck(const char* op, std::int64_t alignment = 0) : op_(op), alignment_(alignment) {}

  /// A view of exactly this shape; one without elements may have no memory.
  template <typename Void, std::size_t kRank>
  void shape(const char* name, const StridedView<Void, kRank>& view,
             const std::array<std::int64_t, kRank>& shape) const {
    if (!view.defined() && !is_empty(shape)) {
      fail(name, fmt::format("a tensor of shape ({})", fmt::join(shape, ", ")), "none");
    }
    if (view.defined() && view.shape != shape) {
      fail(name, fmt::format("shape ({})", fmt::join(shape, ", ")),
           fmt::format("({})", fmt::join(view.shape, ", ")));
    }
  }

  /// Also of this dtype.
  template <typename Void, std::size_t kRank>
  void tensor(const char* name, const StridedView<Void, kRank>& view,
              const std::array<std::int64_t, kRank>& expected, DType dtype) const {
    shape(name, view, expected);
    if (view.defined() && view.dtype != dtype) {
      fail(name, fmt::format("dtype {}", name_of(dtype)), std::string(name_of(view.dtype)));
    }
  }

  /// A contiguous last dimension.
  template <typename Void>
  void contiguous_rows(const char* name, const StridedView<Void, 4>& view) const {
    if (view.defined() && view.shape[3] > 1 && view.strides[3] != 1) {
      fail(name, "a contiguous last dimension", fmt::format("stride {}", view.strides[3]),
           "call .contiguous()");
    }
  }

  /// Rows of head_dim elements: contiguous, aligned as the problem says.
  template <typename Void>
  void rows(const char* name, const StridedView<Void, 4>& view) const {
    contiguous_rows(name, view);
    if (!view.defined() || is_empty(view.shape) || alignment_ == 0) {
      return;
    }
    std::uint64_t bits = reinterpret_cast<std::uintptr_t>(view.data);
    for (std::size_t i = 0; i < 3; ++i) {
      bits |= static_cast<std::uint64_t>(view.strides[i] * size_of(view.dtype));
    }
    if (bits % static_cast<std::uint64_t>(alignment_) != 0) {
      fail(name, fmt::format("a pointer and strides that {} bytes divide", alignment_),
           fmt::format("{} and strides ({})", static_cast<const void*>(view.data),
                       fmt::join(view.strides, ", ")),
           "the problem's alignment promises it");
    }
  }

  /// No output overlaps itself, another one, or an input.
  void outputs(std::initializer_list<Footprint> outputs,
               std::initializer_list<Footprint> inputs) const {
    for (const Footprint* output = outputs.begin(); output != outputs.end(); ++output) {
      if (overlaps_itself(*output)) {
        fail(output->name, "elements that do not share memory", "an expanded or overlapping view",
             "give it memory of its own");
      }
      for (const Footprint* other = output + 1; other != outputs.end(); ++other) {
        require_apart(*output, *other);
      }
      for (const Footprint& input : inputs) {
        require_apart(*output, input);
      }
    }
  }

  [[noreturn]] void fail(const char* name, std::string expected, std::string got,
                         std::string hint = "") const {
    raise<InvalidProblem>({op_, name, std::move(expected), std::move(got), std::move(hint)});
  }

 private:
  template <std::size_t kRank>
  static bool is_empty(const std::array<std::int64_t, kRank>& shape) {
    return std::find(shape.begin(), shape.end(), 0) != shape.end();
  }

  void require_apart(const Footprint& output, const Footprint& other) const {
    if (overlap(output, other)) {
      fail(output.name, fmt::format("memory apart from {}", other.name), "overlapping memory",
           "outputs are written while inputs are read");
    }
  }

  const char* op_;
  std::int64_t alignment_;
};

}  // namespace dilated
