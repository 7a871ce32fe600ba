// What the masks of a call mean for one of its sequences: its length, its keys, its draws.
#pragma once

#include <cstddef>
#include <cstdint>

#include "dilated/attention.h"
#include "dilated/plan.h"

#include "src/dropout.h"

namespace dilated {

/// Sequence `index` as far as it is used (seqused).
inline Sequence used_sequence(const Plan& plan, const Masks& masks, std::size_t index) {
  const Sequence& sequence = plan.sequences()[index];
  return masks.seqused == nullptr ? sequence : sequence.cut(masks.seqused[index]);
}

/// Which keys of one batch element take part, by rows of the key tensor.
class KeyFilter {
 public:
  constexpr KeyFilter(const Masks& masks, std::int64_t batch) {
    if (masks.key_mask.defined()) {
      stride_ = masks.key_mask.strides[1];
      mask_ = static_cast<const unsigned char*>(masks.key_mask.data) +
              batch * masks.key_mask.strides[0];
    }
  }
  constexpr bool operator()(std::int64_t row) const {
    return mask_ == nullptr || mask_[row * stride_] != 0;
  }

 private:
  const unsigned char* mask_ = nullptr;
  std::int64_t stride_ = 0;
};

/// Draws of one (sequence, head, branch); keeps everything without dropout.
inline Dropout dropout_of(const Problem& problem, const Masks& masks, std::size_t sequence,
                          std::int64_t head, std::size_t branch) {
  const std::int64_t* const state = masks.dropout_state;
  const auto word = [state](int i) {
    return state == nullptr ? std::uint64_t{0} : static_cast<std::uint64_t>(state[i]);
  };
  return {problem.dropout_p, word(0), word(1),
          dropout_stream(static_cast<std::int64_t>(sequence), problem.head_offset + head,
                         problem.all_heads(), branch, problem.branches.size())};
}

}  // namespace dilated
