// 2^x for x <= 0, the only exponential of the kernels:
//   n = round(x), f = x - n in [-1/2, 1/2],  2^x = 2^n p(f),  p of degree 5, relative error 9.2e-8.
// x is clamped to [-127, 0]: anything below is +0 exactly, so a masked score of -inf has weight 0.

#if defined(DILATED_KERNELS_CPU_EXP_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef DILATED_KERNELS_CPU_EXP_INL_H_
#undef DILATED_KERNELS_CPU_EXP_INL_H_
#else
#define DILATED_KERNELS_CPU_EXP_INL_H_
#endif

#include "hwy/highway.h"

#include "src/kernels/cpu/gemm-inl.h"

HWY_BEFORE_NAMESPACE();
namespace dilated::HWY_NAMESPACE {

/// `x` is known to be <= 0 (or NaN, which comes out as NaN on x86).
HWY_INLINE FloatVector exp2_of_nonpositive(FloatVector x) {
  const FloatTag tag;
  const hn::RebindToUnsigned<FloatTag> bits;
  // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits.
  const FloatVector shifter = hn::Set(tag, 12582912.0f);
  x = hn::Max(hn::Set(tag, -127.0f), x);
  const FloatVector shifted = hn::Add(x, shifter);
  const FloatVector f = hn::Sub(x, hn::Sub(shifted, shifter));
  FloatVector p = hn::Set(tag, 0.001326472731307149f);
  p = hn::MulAdd(p, f, hn::Set(tag, 0.009671512991189957f));
  p = hn::MulAdd(p, f, hn::Set(tag, 0.05550733581185341f));
  p = hn::MulAdd(p, f, hn::Set(tag, 0.24022242426872253f));
  p = hn::MulAdd(p, f, hn::Set(tag, 0.6931470036506653f));
  p = hn::MulAdd(p, f, hn::Set(tag, 1.0f));
  return hn::BitCast(tag,
                     hn::Add(hn::BitCast(bits, p), hn::ShiftLeft<23>(hn::BitCast(bits, shifted))));
}

/// Any x; what exceeds 0 counts as 0. Exact where rounding alone pushed a log-probability above 0.
HWY_INLINE FloatVector exp2_at_most_one(FloatVector x) {
  return exp2_of_nonpositive(hn::Min(hn::Zero(FloatTag()), x));
}

}  // namespace dilated::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif
