// Scalar conversions of the 16-bit formats against their definition: every pattern, and rounding to
// nearest even.
#include "src/half.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include <gtest/gtest.h>

#include "tests/support/call.h"

namespace dilated {
namespace {

/// Value of a 16-bit pattern by the IEEE definition.
double value_of(std::uint32_t bits, int mantissa_bits) {
  const int exponent_bits = 15 - mantissa_bits;
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const double sign = (bits & 0x8000u) != 0 ? -1.0 : 1.0;
  const int exponent = static_cast<int>((bits & 0x7FFFu) >> mantissa_bits);
  const auto mantissa = static_cast<double>(bits & ((1u << mantissa_bits) - 1u));
  if (exponent == (1 << exponent_bits) - 1) {
    return mantissa == 0.0 ? sign * std::numeric_limits<double>::infinity() : std::nan("");
  }
  return exponent == 0
             ? sign * std::ldexp(mantissa, 1 - bias - mantissa_bits)
             : sign * std::ldexp(1.0 + std::ldexp(mantissa, -mantissa_bits), exponent - bias);
}

/// Nearest representable value, ties to even, by scaling to integers. The current rounding mode is
/// to nearest even.
double rounded(double value, int mantissa_bits) {
  const int bias = (1 << (14 - mantissa_bits)) - 1;
  int exponent = 0;
  std::frexp(value, &exponent);
  const int step = std::max(exponent - 1, 1 - bias) - mantissa_bits;
  const double result = std::ldexp(std::nearbyint(std::ldexp(value, -step)), step);
  const double largest = std::ldexp(2.0 - std::ldexp(1.0, -mantissa_bits), bias);
  return std::abs(result) > largest ? std::copysign(std::numeric_limits<double>::infinity(), value)
                                    : result;
}

TEST(Half, EveryPatternWidensToItsValueAndBack) {
  for (std::uint32_t bits = 0; bits < 65536; ++bits) {
    const auto half = static_cast<std::uint16_t>(bits);
    const double bfloat16 = value_of(bits, 7);
    const double float16 = value_of(bits, 10);
    if (std::isnan(bfloat16)) {
      ASSERT_TRUE(std::isnan(float_of_bfloat16(half)));
    } else {
      ASSERT_EQ(static_cast<double>(float_of_bfloat16(half)), bfloat16) << bits;
      ASSERT_EQ(bfloat16_of_float(float_of_bfloat16(half)), half);
    }
    if (std::isnan(float16)) {
      ASSERT_TRUE(std::isnan(float_of_float16(half)));
      ASSERT_TRUE(std::isnan(float_of_float16(float16_of_float(float_of_float16(half)))));
    } else {
      ASSERT_EQ(static_cast<double>(float_of_float16(half)), float16) << bits;
      ASSERT_EQ(float16_of_float(float_of_float16(half)), half);
    }
  }
}

TEST(Half, NarrowingRoundsToNearestEven) {
  for (std::uint64_t i = 0; i < 400'000; ++i) {
    const int exponent = static_cast<int>(i % 60) - 32;
    const auto value = static_cast<float>(std::ldexp(testing::val(9, i), exponent));
    const double exact = static_cast<double>(value);
    ASSERT_EQ(static_cast<double>(float_of_bfloat16(bfloat16_of_float(value))), rounded(exact, 7))
        << value;
    ASSERT_EQ(static_cast<double>(float_of_float16(float16_of_float(value))), rounded(exact, 10))
        << value;
  }
  for (std::uint32_t bits = 0; bits < 0x7BFFu; ++bits) {  // halfway between neighbours
    const double low = value_of(bits, 10);
    const double high = value_of(bits + 1, 10);
    const auto middle = static_cast<float>((low + high) / 2.0);
    ASSERT_EQ(float16_of_float(middle), bits % 2 == 0 ? bits : bits + 1);
  }
  EXPECT_EQ(float16_of_float(65520.0f), 0x7C00u);
  EXPECT_EQ(float16_of_float(65519.0f), 0x7BFFu);
  EXPECT_EQ(bfloat16_of_float(std::numeric_limits<float>::infinity()), 0x7F80u);
  EXPECT_TRUE(
      std::isnan(float_of_bfloat16(bfloat16_of_float(std::numeric_limits<float>::quiet_NaN()))));
}

}  // namespace
}  // namespace dilated
