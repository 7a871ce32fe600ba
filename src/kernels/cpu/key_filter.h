// Which keys of one sequence take part.
#pragma once

#include <cstdint>

#include "dilated/attention.h"

namespace dilated::cpu {

/// The key mask by rows of the key tensor.
class KeyFilter {
 public:
  KeyFilter(const Masks& masks, std::int64_t batch) {
    if (masks.key_mask.defined()) {
      stride_ = masks.key_mask.strides[1];
      mask_ = static_cast<const unsigned char*>(masks.key_mask.data) +
              batch * masks.key_mask.strides[0];
    }
  }
  bool operator()(std::int64_t row) const { return mask_ == nullptr || mask_[row * stride_] != 0; }

 private:
  const unsigned char* mask_ = nullptr;
  std::int64_t stride_ = 0;
};

}  // namespace dilated::cpu
