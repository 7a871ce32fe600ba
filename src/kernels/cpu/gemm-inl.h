// Register-blocked products of operands that already lie in the first two cache levels:
//   C[rows x columns] = finish( sum_k A[row][k] * B[k][column] )
// A is read by broadcast, so its strides are free (a transposed operand costs nothing); B and C are
// row-major with vectors along their columns. What happens to a block of sums (store, add, running
// maximum, softmax gradient) is a small functor, so that no product makes an extra pass over C.

#if defined(DILATED_KERNELS_CPU_GEMM_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef DILATED_KERNELS_CPU_GEMM_INL_H_
#undef DILATED_KERNELS_CPU_GEMM_INL_H_
#else
#define DILATED_KERNELS_CPU_GEMM_INL_H_
#endif

#include <cstddef>

#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace dilated::HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

using FloatTag = hn::CappedTag<float, 16>;
using FloatVector = hn::Vec<FloatTag>;
inline constexpr std::size_t kVectorFloats = hn::MaxLanes(FloatTag());

// AVX-512 and AArch64 have 32 vector registers: 24 sums, 4 of B, 1 of A. Elsewhere there are 16:
// 12 sums, 2 of B, 1 of A.
inline constexpr bool kManyRegisters =
    HWY_ARCH_X86 ? kVectorFloats >= 16 : (HWY_ARCH_ARM_A64 || HWY_ARCH_PPC);
inline constexpr std::size_t kPanelVectors = kManyRegisters ? 4 : 2;

/// Rows of a block that is `vectors` wide: enough independent sums to hide the latency of a
/// multiply-add.
constexpr std::size_t block_rows(std::size_t vectors) {
  if (kManyRegisters) {
    return vectors >= 4 ? 6 : vectors == 3 ? 8 : 12;
  }
  return vectors == 2 ? 6 : 8;
}

/// Left operand: element (row, k) is data[row * row_stride + k * depth_stride].
struct Broadcast {
  const float* data;
  std::ptrdiff_t row_stride;
  std::ptrdiff_t depth_stride;
};

/// Sums of a block, zero at first.
template <std::size_t kRows, std::size_t kVectors>
struct Block {
  FloatVector sum[kRows][kVectors];

  // Written out: a constructor that GCC makes itself lacks the SIMD target, on Arm an error.
  HWY_INLINE Block() {
    for (std::size_t i = 0; i < kRows; ++i) {
      for (std::size_t v = 0; v < kVectors; ++v) {
        sum[i][v] = hn::Zero(FloatTag());
      }
    }
  }
};

/// Stores the sums in `out`, or adds them to what is there.
template <bool kAdd>
struct Write {
  float* out;
  std::size_t stride;

  template <std::size_t kRows, std::size_t kVectors>
  HWY_INLINE void operator()(const Block<kRows, kVectors>& block, std::size_t row,
                             std::size_t column) const {
    const FloatTag tag;
    for (std::size_t i = 0; i < kRows; ++i) {
      for (std::size_t v = 0; v < kVectors; ++v) {
        float* at = out + (row + i) * stride + column + v * kVectorFloats;
        FloatVector sum = block.sum[i][v];
        if constexpr (kAdd) {
          sum = hn::Add(hn::LoadU(tag, at), sum);
        }
        hn::StoreU(sum, tag, at);
      }
    }
  }
};
using Store = Write<false>;
using Accumulate = Write<true>;

/// One block of kRows x kVectors sums, kept in registers over the whole depth.
template <std::size_t kRows, std::size_t kVectors, class Finish>
HWY_INLINE void multiply_block(const Broadcast& a, std::size_t row, std::size_t depth,
                               const float* b, std::size_t b_stride, std::size_t column,
                               const Finish& finish) {
  const FloatTag tag;
  Block<kRows, kVectors> block;
  // Four rows share a base pointer: five address registers serve twelve rows.
  constexpr std::size_t kBases = (kRows + 3) / 4;
  const float* base[kBases];
  for (std::size_t g = 0; g < kBases; ++g) {
    base[g] = a.data + static_cast<std::ptrdiff_t>(row + 4 * g) * a.row_stride;
  }
  const std::ptrdiff_t row_stride = a.row_stride;
  const std::ptrdiff_t depth_stride = a.depth_stride;
  b += column;
  for (std::size_t k = 0; k < depth; ++k) {
    FloatVector right[kVectors];
    for (std::size_t v = 0; v < kVectors; ++v) {
      right[v] = hn::LoadU(tag, b + v * kVectorFloats);
    }
    for (std::size_t i = 0; i < kRows; ++i) {
      const FloatVector left =
          hn::Set(tag, base[i / 4][static_cast<std::ptrdiff_t>(i % 4) * row_stride]);
      for (std::size_t v = 0; v < kVectors; ++v) {
        block.sum[i][v] = hn::MulAdd(left, right[v], block.sum[i][v]);
      }
    }
    for (std::size_t g = 0; g < kBases; ++g) {
      base[g] += depth_stride;
    }
    b += b_stride;
  }
  finish(block, row, column);
}

template <std::size_t kRows, std::size_t kVectors, class Finish>
HWY_INLINE void multiply_rows(const Broadcast& a, std::size_t row, std::size_t rows,
                              std::size_t depth, const float* b, std::size_t b_stride,
                              std::size_t column, const Finish& finish) {
  for (; row + kRows <= rows; row += kRows) {
    multiply_block<kRows, kVectors>(a, row, depth, b, b_stride, column, finish);
  }
  if constexpr (kRows > 1) {
    if (row < rows) {
      constexpr std::size_t kFewer = kRows > 8 ? 8 : kRows > 4 ? 4 : kRows / 2;
      multiply_rows<kFewer, kVectors>(a, row, rows, depth, b, b_stride, column, finish);
    }
  }
}

template <std::size_t kVectors, class Finish>
HWY_NOINLINE void multiply_panel(const Broadcast& a, std::size_t rows, std::size_t depth,
                                 const float* b, std::size_t b_stride, std::size_t column,
                                 const Finish& finish) {
  multiply_rows<block_rows(kVectors), kVectors>(a, 0, rows, depth, b, b_stride, column, finish);
}

/// The product. `columns` is rounded up to whole vectors: B must be readable and C writable that
/// far.
template <class Finish>
HWY_INLINE void multiply(const Broadcast& a, std::size_t rows, std::size_t depth, const float* b,
                         std::size_t b_stride, std::size_t columns, const Finish& finish) {
  std::size_t vectors = (columns + kVectorFloats - 1) / kVectorFloats;
  std::size_t panels = (vectors + kPanelVectors - 1) / kPanelVectors;
  std::size_t column = 0;
  for (; panels > 0; --panels) {
    const std::size_t width = (vectors + panels - 1) / panels;  // balanced: 6 = 3 + 3, not 4 + 2
    if constexpr (kPanelVectors == 4) {
      if (width == 4) {
        multiply_panel<4>(a, rows, depth, b, b_stride, column, finish);
      } else if (width == 3) {
        multiply_panel<3>(a, rows, depth, b, b_stride, column, finish);
      }
    }
    if (width == 2) {
      multiply_panel<2>(a, rows, depth, b, b_stride, column, finish);
    } else if (width == 1) {
      multiply_panel<1>(a, rows, depth, b, b_stride, column, finish);
    }
    column += width * kVectorFloats;
    vectors -= width;
  }
}

}  // namespace dilated::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif
