// Rows between the caller's dtype and float32 tiles: straight copies, copies into columns, and the
// way back. Conversions are exact inwards and round to nearest even outwards.

#if defined(DILATED_KERNELS_CPU_PACK_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef DILATED_KERNELS_CPU_PACK_INL_H_
#undef DILATED_KERNELS_CPU_PACK_INL_H_
#else
#define DILATED_KERNELS_CPU_PACK_INL_H_
#endif

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "hwy/highway.h"

#include "dilated/tensor_view.h"

#include "src/half.h"
#include "src/kernels/cpu/gemm-inl.h"

HWY_BEFORE_NAMESPACE();
namespace dilated::HWY_NAMESPACE {

/// Vector of floats from 16-bit words.
HWY_INLINE FloatVector widen(DType dtype, const std::uint16_t* words) {
  const FloatTag tag;
  const hn::Rebind<std::uint16_t, FloatTag> half_bits;
  const auto bits = hn::LoadU(half_bits, words);
  if (dtype == DType::kBFloat16) {
    const hn::RebindToUnsigned<FloatTag> wide_bits;
    return hn::BitCast(tag, hn::ShiftLeft<16>(hn::PromoteTo(wide_bits, bits)));
  }
  const hn::Rebind<hwy::float16_t, FloatTag> half;
  return hn::PromoteTo(tag, hn::BitCast(half, bits));
}

/// to[c] = factor * from[c] for c < count; `to` is zeroed up to `padded`.
HWY_INLINE void load_row(DType dtype, const std::byte* from, std::size_t count, float factor,
                         float* to, std::size_t padded) {
  const FloatTag tag;
  const FloatVector factors = hn::Set(tag, factor);
  std::size_t c = 0;
  if (dtype == DType::kFloat32) {
    const float* source = reinterpret_cast<const float*>(from);
    for (; c + kVectorFloats <= count; c += kVectorFloats) {
      hn::StoreU(hn::Mul(factors, hn::LoadU(tag, source + c)), tag, to + c);
    }
    for (; c < count; ++c) {
      to[c] = factor * source[c];
    }
  } else {
    const auto* source = reinterpret_cast<const std::uint16_t*>(from);
    for (; c + kVectorFloats <= count; c += kVectorFloats) {
      hn::StoreU(hn::Mul(factors, widen(dtype, source + c)), tag, to + c);
    }
    for (; c < count; ++c) {
      to[c] = factor * (dtype == DType::kBFloat16 ? float_of_bfloat16(source[c])
                                                  : float_of_float16(source[c]));
    }
  }
  for (; c < padded; ++c) {
    to[c] = 0.0f;
  }
}

/// to[c] = from[c] rounded to the dtype.
HWY_INLINE void store_row(DType dtype, const float* from, std::size_t count, std::byte* to) {
  if (dtype == DType::kFloat32) {
    std::memcpy(to, from, count * sizeof(float));
    return;
  }
  auto* target = reinterpret_cast<std::uint16_t*>(to);
  for (std::size_t c = 0; c < count; ++c) {
    target[c] = dtype == DType::kBFloat16 ? bfloat16_of_float(from[c]) : float16_of_float(from[c]);
  }
}

#if HWY_TARGET == HWY_SCALAR
/// to[c][r] = from[r][c] for r < rows, c < columns.
HWY_INLINE void transpose(const float* HWY_RESTRICT from, std::size_t from_stride, std::size_t rows,
                          std::size_t columns, float* HWY_RESTRICT to, std::size_t to_stride) {
  for (std::size_t r = 0; r < rows; ++r) {
    for (std::size_t c = 0; c < columns; ++c) {
      to[c * to_stride + r] = from[r * from_stride + c];
    }
  }
}
#else
/// to[c][r] = from[r][c] for r < rows, c < columns, in blocks of 4 x 4. Overwrites `to` up to a
/// multiple of 4 rows (its columns) and reads `from` up to a multiple of 4 rows and columns.
HWY_INLINE void transpose(const float* HWY_RESTRICT from, std::size_t from_stride, std::size_t rows,
                          std::size_t columns, float* HWY_RESTRICT to, std::size_t to_stride) {
  const hn::CappedTag<float, 4> tag;
  const hn::RepartitionToWide<hn::RebindToUnsigned<decltype(tag)>> wide;
  for (std::size_t r = 0; r < rows; r += 4) {
    for (std::size_t c = 0; c < columns; c += 4) {
      const float* const source = from + r * from_stride + c;
      float* const target = to + c * to_stride + r;
      const auto a = hn::LoadU(tag, source);
      const auto b = hn::LoadU(tag, source + from_stride);
      const auto d = hn::LoadU(tag, source + 2 * from_stride);
      const auto e = hn::LoadU(tag, source + 3 * from_stride);
      const auto ab_low = hn::BitCast(wide, hn::InterleaveLower(tag, a, b));
      const auto ab_high = hn::BitCast(wide, hn::InterleaveUpper(tag, a, b));
      const auto de_low = hn::BitCast(wide, hn::InterleaveLower(tag, d, e));
      const auto de_high = hn::BitCast(wide, hn::InterleaveUpper(tag, d, e));
      hn::StoreU(hn::BitCast(tag, hn::InterleaveLower(wide, ab_low, de_low)), tag, target);
      if (c + 1 < columns) {
        hn::StoreU(hn::BitCast(tag, hn::InterleaveUpper(wide, ab_low, de_low)), tag,
                   target + to_stride);
      }
      if (c + 2 < columns) {
        hn::StoreU(hn::BitCast(tag, hn::InterleaveLower(wide, ab_high, de_high)), tag,
                   target + 2 * to_stride);
      }
      if (c + 3 < columns) {
        hn::StoreU(hn::BitCast(tag, hn::InterleaveUpper(wide, ab_high, de_high)), tag,
                   target + 3 * to_stride);
      }
    }
  }
}

#endif

/// y[c] += factor * x[c].
HWY_INLINE void add_row(const float* x, float factor, std::size_t count, float* y) {
  const FloatTag tag;
  const FloatVector factors = hn::Set(tag, factor);
  std::size_t c = 0;
  for (; c + kVectorFloats <= count; c += kVectorFloats) {
    hn::StoreU(hn::MulAdd(factors, hn::LoadU(tag, x + c), hn::LoadU(tag, y + c)), tag, y + c);
  }
  for (; c < count; ++c) {
    y[c] += factor * x[c];
  }
}

/// y[c] = a * y[c] + b * x[c] over whole vectors: count is a multiple of 16.
HWY_INLINE void blend_row(float a, float b, const float* x, std::size_t count, float* y) {
  const FloatTag tag;
  const FloatVector old_weight = hn::Set(tag, a);
  const FloatVector new_weight = hn::Set(tag, b);
  for (std::size_t c = 0; c < count; c += kVectorFloats) {
    const FloatVector scaled = hn::Mul(old_weight, hn::LoadU(tag, y + c));
    hn::StoreU(hn::MulAdd(new_weight, hn::LoadU(tag, x + c), scaled), tag, y + c);
  }
}

/// No infinity, no NaN among count numbers.
HWY_INLINE bool is_finite(const float* x, std::size_t count) {
  const FloatTag tag;
  FloatVector sum = hn::Zero(tag);  // 0 times anything finite is 0
  std::size_t c = 0;
  for (; c + kVectorFloats <= count; c += kVectorFloats) {
    sum = hn::MulAdd(hn::LoadU(tag, x + c), hn::Zero(tag), sum);
  }
  float total = hn::GetLane(hn::SumOfLanes(tag, sum));
  for (; c < count; ++c) {
    total += 0.0f * x[c];
  }
  return total == 0.0f;
}

/// dots[r] = sum over c of x[r][c] * y[r][c], added in the order of `multiply`: where y is a row of
/// that product's other operand, the bits are the same. Eight rows at once hide the latency.
HWY_INLINE void dot_rows(const float* x, std::size_t x_stride, const float* y, std::size_t y_stride,
                         std::size_t rows, std::size_t count, float* dots) {
  const hn::CappedTag<float, 1> one;
  constexpr std::size_t kRows = 8;
  for (std::size_t first = 0; first < rows; first += kRows) {
    const std::size_t last = std::min(first + kRows, rows);
    hn::Vec<decltype(one)> sum[kRows];
    for (std::size_t r = 0; r < kRows; ++r) {
      sum[r] = hn::Zero(one);
    }
    if (last - first == kRows) {
      const float* a = x + first * x_stride;
      const float* b = y + first * y_stride;
      for (std::size_t c = 0; c < count; ++c) {
        for (std::size_t r = 0; r < kRows; ++r) {
          sum[r] = hn::MulAdd(hn::LoadU(one, a + r * x_stride + c),
                              hn::LoadU(one, b + r * y_stride + c), sum[r]);
        }
      }
    } else {
      for (std::size_t r = first; r < last; ++r) {
        for (std::size_t c = 0; c < count; ++c) {
          sum[r - first] = hn::MulAdd(hn::LoadU(one, x + r * x_stride + c),
                                      hn::LoadU(one, y + r * y_stride + c), sum[r - first]);
        }
      }
    }
    for (std::size_t r = first; r < last; ++r) {
      dots[r] = hn::GetLane(sum[r - first]);
    }
  }
}

}  // namespace dilated::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif
