// Where the gradients of the inputs are summed.

#if defined(DILATED_KERNELS_CPU_GRADIENT_SUMS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef DILATED_KERNELS_CPU_GRADIENT_SUMS_INL_H_
#undef DILATED_KERNELS_CPU_GRADIENT_SUMS_INL_H_
#else
#define DILATED_KERNELS_CPU_GRADIENT_SUMS_INL_H_
#endif

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>

#include "hwy/highway.h"

#include "dilated/attention.h"

#include "src/hand_out.h"
#include "src/kernels/cpu/addressing.h"
#include "src/kernels/cpu/pack-inl.h"

HWY_BEFORE_NAMESPACE();
namespace dilated::HWY_NAMESPACE {

/// The three gradients. Each is summed in float32: in the caller's tensor where that is float32,
/// else in scratch memory, and rounded once at the end.
class GradientSums {
 public:
  /// Scratch memory starts at `memory`.
  GradientSums(const BackwardTensors& tensors, std::byte* memory)
      : all_{Gradient::of(tensors.dquery, memory), Gradient::of(tensors.dkey, memory),
             Gradient::of(tensors.dvalue, memory)} {}

  const TensorView& dquery() const { return all_[0].sums; }
  const TensorView& dkey() const { return all_[1].sums; }
  const TensorView& dvalue() const { return all_[2].sums; }

  void clear(const ParallelFor& threads) const {
    for_each_token(threads, [](const Gradient& gradient, std::int64_t batch, std::int64_t token) {
      const TensorView& sums = gradient.sums;
      for (std::int64_t head = 0; head < sums.shape[2]; ++head) {
        std::fill_n(reinterpret_cast<float*>(cpu::row_at(sums, batch, token, head)),
                    static_cast<std::size_t>(sums.shape[3]), 0.0f);
      }
    });
  }

  /// Writes the tensors of the caller that are not float32.
  void round(const ParallelFor& threads) const {
    const auto is_float = [](const Gradient& gradient) {
      return gradient.result.dtype == DType::kFloat32;
    };
    if (std::all_of(all_.begin(), all_.end(), is_float)) {
      return;
    }
    for_each_token(threads, [&](const Gradient& gradient, std::int64_t batch, std::int64_t token) {
      const TensorView& to = gradient.result;
      for (std::int64_t head = 0; head < to.shape[2] && !is_float(gradient); ++head) {
        const std::byte* const from = cpu::row_at(gradient.sums, batch, token, head);
        store_row(to.dtype, reinterpret_cast<const float*>(from),
                  static_cast<std::size_t>(to.shape[3]), cpu::row_at(to, batch, token, head));
      }
    });
  }

 private:
  struct Gradient {
    TensorView sums;
    TensorView result;

    /// Takes what it needs of `memory`.
    static Gradient of(const TensorView& result, std::byte*& memory) {
      if (result.dtype == DType::kFloat32) {
        return {result, result};
      }
      const std::int64_t token = result.shape[2] * result.shape[3];
      const TensorView sums = {memory,
                               DType::kFloat32,
                               result.shape,
                               {result.shape[1] * token, token, result.shape[3], 1}};
      memory +=
          result.shape[0] * result.shape[1] * token * static_cast<std::int64_t>(sizeof(float));
      return {sums, result};
    }

    std::int64_t tokens() const { return result.shape[0] * result.shape[1]; }
  };

  /// Calls `body(gradient, batch, token)` for every token of the three gradients.
  template <typename Body>
  void for_each_token(const ParallelFor& threads, const Body& body) const {
    std::int64_t total = 0;
    for (const Gradient& gradient : all_) {
      total += gradient.tokens();
    }
    hand_out(threads, total, [&](std::int64_t begin, std::int64_t end, int /*thread*/) {
      std::int64_t first = 0;
      for (const Gradient& gradient : all_) {
        for (std::int64_t i = std::max(begin, first); i < std::min(end, first + gradient.tokens());
             ++i) {
          const std::int64_t rows = gradient.result.shape[1];
          body(gradient, (i - first) / rows, (i - first) % rows);
        }
        first += gradient.tokens();
      }
    });
  }

  std::array<Gradient, 3> all_;
};

}  // namespace dilated::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif
