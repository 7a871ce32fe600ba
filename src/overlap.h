// Do two strided views share a byte? Outputs that do would be races; the caller is told before
// anything is written.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "dilated/tensor_view.h"

namespace dilated {

/// Where the elements of a view lie, in bytes.
struct Footprint {
  const char* name = "";
  std::uintptr_t address = 0;
  std::int64_t element = 0;  // bytes
  std::array<std::int64_t, 4> shape{};
  std::array<std::int64_t, 4> strides{};  // bytes

  template <typename Void, std::size_t kRank>
  Footprint(const char* view_name, const StridedView<Void, kRank>& view)
      : name(view_name),
        address(reinterpret_cast<std::uintptr_t>(view.data)),
        element(size_of(view.dtype)) {
    static_assert(kRank <= 4);
    shape.fill(1);
    for (std::size_t i = 0; i < kRank; ++i) {
      shape[i] = view.shape[i];
      strides[i] = view.strides[i] * element;
    }
  }

  bool empty() const { return address == 0 || shape[0] * shape[1] * shape[2] * shape[3] == 0; }
};

/// True if two elements of the view share a byte.
bool overlaps_itself(const Footprint& view);

/// True if an element of `a` and an element of `b` share a byte.
bool overlap(const Footprint& a, const Footprint& b);

}  // namespace dilated
