// Products of a warpgroup with rows as the copy engine loads them: panels of 64 columns, swizzled.
#pragma once

#include <cstdint>

#include "src/kernels/cuda/device/wgmma.cuh"
#include "src/kernels/cuda/tiles_sm90.cuh"

namespace dilated::gpu::sm90 {

inline constexpr int kDepth = 16;

/// acc = a b^T: 64 rows of `a` from `first_row` on with all rows of `b`, both as loaded; kColumns
/// of each.
template <int kColumns, typename Element, int kPanels, int kRowsA, int kRowsB>
__device__ inline void multiply_rows(float (&acc)[kRowsB / kPanelColumns / 2],
                                     Element (&a)[kPanels][kRowsA], int first_row,
                                     Element (&b)[kPanels][kRowsB]) {
  static_assert(kColumns % kDepth == 0 && kColumns <= kPanels * kPanelColumns);
  begin_products();
  pin(acc);
#pragma unroll
  for (int k = 0; k < kColumns / kDepth; ++k) {
    const int panel = k * kDepth / kPanelColumns;
    const std::uint32_t bytes = k * kDepth % kPanelColumns * sizeof(Element);
    Product<Element, kRowsB / kPanelColumns, false>::run(
        acc, advance(operand_of(a[panel] + first_row * kPanelColumns), bytes),
        advance(operand_of(b[panel]), bytes), k > 0);
  }
  pin(acc);
  commit_products();
}

/// acc += a b: probabilities or their gradients with the first columns of the rows that they are
/// summed over.
template <typename Element, int kPanels, int kRows, int kSteps, int kCount>
__device__ inline void add_product(float (&acc)[kCount], std::uint32_t (&a)[kSteps][4],
                                   Element (&b)[kPanels][kRows], bool accumulate) {
  static_assert(2 * kCount <= kPanels * kPanelColumns && kRows == kSteps * kDepth * kPanelColumns);
  const std::uint64_t rows = operand_of(b[0], sizeof(b[0]));
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
    Product<Element, 2 * kCount, true>::run(acc, a[k], advance(rows, k * kDepth * 128),
                                            accumulate || k > 0);
  }
}

}  // namespace dilated::gpu::sm90
