// merge and its gradient, here on the CPU: parts are folded in their order, in double, rounded
// once.
//   dO_i = w_i dO        dl_i = w_i (dO.(O_i - O) + dL)        w_i = e^(l_i - L)
#include "dilated/merge.h"

#include <algorithm>
#include <array>
#include <functional>
#include <string>
#include <type_traits>
#include <vector>

#include "src/cuda_merge.h"
#include "src/half.h"
#include "src/hand_out.h"
#include "src/merge.h"
#include "src/view_check.h"

namespace dilated {
namespace {

struct BFloat16 {
  std::uint16_t bits;
  explicit operator double() const { return double{float_of_bfloat16(bits)}; }
  static BFloat16 of(double x) { return {bfloat16_of_float(static_cast<float>(x))}; }
};
struct Float16 {
  std::uint16_t bits;
  explicit operator double() const { return double{float_of_float16(bits)}; }
  static Float16 of(double x) { return {float16_of_float(static_cast<float>(x))}; }
};

template <typename Element>
Element element_of(double x) {
  if constexpr (std::is_floating_point_v<Element>) {
    return static_cast<Element>(x);
  } else {
    return Element::of(x);
  }
}

/// Calls body.template operator()<Element>() for the type of `dtype`.
template <typename Body>
void with_element(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::kFloat32:
      return body.template operator()<float>();
    case DType::kFloat64:
      return body.template operator()<double>();
    case DType::kBFloat16:
      return body.template operator()<BFloat16>();
    case DType::kFloat16:
      return body.template operator()<Float16>();
  }
}

/// A row of one (batch, row, head).
struct At {
  std::int64_t batch, row, head;
};

template <typename Void>
auto* address_of(const StridedView<Void, 4>& view, const At& at) {
  using Byte = std::conditional_t<std::is_const_v<Void>, const std::byte, std::byte>;
  return static_cast<Byte*>(view.data) +
         (at.batch * view.strides[0] + at.row * view.strides[1] + at.head * view.strides[2]) *
             size_of(view.dtype);
}

std::int64_t offset_of(const ConstRowView& view, const At& at) {
  return at.batch * view.strides[0] + at.head * view.strides[1] + at.row * view.strides[2];
}

double value_of(const ConstRowView& view, const At& at) {
  return view.dtype == DType::kFloat64 ? static_cast<const double*>(view.data)[offset_of(view, at)]
                                       : static_cast<const float*>(view.data)[offset_of(view, at)];
}

void store(const RowView& view, const At& at, double value) {
  const std::int64_t i =
      at.batch * view.strides[0] + at.head * view.strides[1] + at.row * view.strides[2];
  if (view.dtype == DType::kFloat64) {
    static_cast<double*>(view.data)[i] = value;
  } else {
    static_cast<float*>(view.data)[i] = static_cast<float>(value);
  }
}

void load_row(const ConstTensorView& view, const At& at, std::vector<double>& to) {
  with_element(view.dtype, [&]<typename Element>() {
    const auto* from = reinterpret_cast<const Element*>(address_of(view, at));
    for (std::size_t c = 0; c < to.size(); ++c) {
      to[c] = static_cast<double>(from[c]);
    }
  });
}

void store_row(const TensorView& view, const At& at, const std::vector<double>& from) {
  with_element(view.dtype, [&]<typename Element>() {
    auto* to = reinterpret_cast<Element*>(address_of(view, at));
    for (std::size_t c = 0; c < from.size(); ++c) {
      to[c] = element_of<Element>(from[c]);
    }
  });
}

/// The merged row: `out` and the returned log-sum-exp.
double merge_row(std::span<const Partial> parts, const At& at, std::vector<double>& part,
                 std::vector<double>& out) {
  std::fill(out.begin(), out.end(), 0.0);
  double lse = kAbsentLse<double>;
  for (const Partial& partial : parts) {
    const double part_lse = value_of(partial.lse, at);
    if (part_lse == kAbsentLse<double>) {
      continue;  // an absent row may hold anything
    }
    load_row(partial.out, at, part);
    const MergeWeights<double> weights = merge_weights(lse, part_lse);
    lse = weights.lse;
    for (std::size_t c = 0; c < out.size(); ++c) {
      out[c] = weights.first * out[c] + weights.second * part[c];
    }
  }
  return lse;
}

using RowBody =
    std::function<void(const At&, std::vector<double>& first, std::vector<double>& second)>;

/// Runs `body` over all rows, with two vectors of head_dim numbers per thread.
void for_each_row(const std::array<std::int64_t, 4>& shape, const Context& context,
                  const RowBody& body) {
  const ParallelFor& threads =
      context.parallel_for != nullptr ? *context.parallel_for : default_parallel_for();
  hand_out(threads, shape[0] * shape[1] * shape[2], [&](std::int64_t begin, std::int64_t end, int) {
    std::vector<double> first(static_cast<std::size_t>(shape[3]));
    std::vector<double> second(static_cast<std::size_t>(shape[3]));
    for (std::int64_t i = begin; i < end; ++i) {
      body({i / (shape[1] * shape[2]), i / shape[2] % shape[1], i % shape[2]}, first, second);
    }
  });
}

/// All parts agree with the first one.
void check_parts(const ViewCheck& check, std::span<const Partial> parts) {
  if (parts.empty()) {
    check.fail("parts", "at least one partial result", "none");
  }
  const auto& shape = parts.front().out.shape;
  const DType dtype = parts.front().out.dtype;
  for (std::size_t i = 0; i < parts.size(); ++i) {
    const std::string out = fmt::format("parts[{}].out", i);
    check.tensor(out.c_str(), parts[i].out, shape, dtype);
    check.rows(out.c_str(), parts[i].out);
    check.tensor(fmt::format("parts[{}].lse", i).c_str(), parts[i].lse,
                 {shape[0], shape[2], shape[1]}, accumulation_dtype(dtype));
  }
}

}  // namespace

void merge(std::span<const Partial> parts, const TensorView& out, const RowView& lse,
           const Context& context, const DeviceSpec& device) {
  const ViewCheck check("merge");
  check_parts(check, parts);
  const auto& shape = parts.front().out.shape;
  check.shape("out", out, shape);
  check.rows("out", out);
  check.tensor("lse", lse, {shape[0], shape[2], shape[1]},
               accumulation_dtype(parts.front().out.dtype));
  check.outputs({{"out", out}, {"lse", lse}}, {});
  for (const Partial& part : parts) {
    check.outputs({{"out", out}, {"lse", lse}}, {{"parts", part.out}, {"parts", part.lse}});
  }
  if (device.kind == Device::kCuda) {
    return cuda_merge(parts, out, lse, context, device);
  }
  for_each_row(shape, context,
               [&](const At& at, std::vector<double>& part, std::vector<double>& merged) {
                 store(lse, at, merge_row(parts, at, part, merged));
                 store_row(out, at, merged);
               });
}

void merge_backward(std::span<const Partial> parts, const ConstTensorView& dout,
                    const ConstRowView& dlse, std::span<const PartialGradient> gradients,
                    const Context& context, const DeviceSpec& device) {
  const ViewCheck check("merge_backward");
  check_parts(check, parts);
  const auto& shape = parts.front().out.shape;
  const DType dtype = parts.front().out.dtype;
  const std::array<std::int64_t, 3> row_shape = {shape[0], shape[2], shape[1]};
  check.shape("dout", dout, shape);
  check.rows("dout", dout);
  if (dlse.defined()) {
    check.tensor("dlse", dlse, row_shape, accumulation_dtype(dtype));
  }
  if (gradients.size() != parts.size()) {
    check.fail("gradients", fmt::format("one per part, {}", parts.size()),
               fmt::format("{}", gradients.size()));
  }
  for (const PartialGradient& gradient : gradients) {
    check.tensor("gradients.out", gradient.out, shape, dtype);
    check.rows("gradients.out", gradient.out);
    check.tensor("gradients.lse", gradient.lse, row_shape, accumulation_dtype(dtype));
    check.outputs({{"gradients.out", gradient.out}, {"gradients.lse", gradient.lse}},
                  {{"dout", dout}, {"dlse", dlse}});
  }
  if (device.kind == Device::kCuda) {
    return cuda_merge_backward(parts, dout, dlse, gradients, context, device);
  }
  for_each_row(
      shape, context, [&](const At& at, std::vector<double>& part, std::vector<double>& upstream) {
        const auto dot_upstream = [&](const std::vector<double>& x) {
          double sum = 0.0;
          for (std::size_t c = 0; c < x.size(); ++c) {
            sum += upstream[c] * x[c];
          }
          return sum;
        };
        std::vector<double> deltas(parts.size(), 0.0);
        const double lse = merge_row(parts, at, part, upstream);  // its out is not needed
        load_row(dout, at, upstream);
        double delta = 0.0;  // dO.O
        for (std::size_t i = 0; i < parts.size(); ++i) {
          const double part_lse = value_of(parts[i].lse, at);
          if (part_lse != kAbsentLse<double>) {
            load_row(parts[i].out, at, part);
            deltas[i] = dot_upstream(part);
            delta += std::exp(part_lse - lse) * deltas[i];
          }
        }
        const double row_dlse = dlse.defined() ? value_of(dlse, at) : 0.0;
        for (std::size_t i = 0; i < parts.size(); ++i) {
          const double part_lse = value_of(parts[i].lse, at);
          const bool absent = part_lse == kAbsentLse<double>;
          const double weight = absent ? 0.0 : std::exp(part_lse - lse);
          std::transform(upstream.begin(), upstream.end(), part.begin(),
                         [&](double x) { return absent ? 0.0 : weight * x; });
          store_row(gradients[i].out, at, part);
          store(gradients[i].lse, at, absent ? 0.0 : weight * (deltas[i] - delta + row_dlse));
        }
      });
}

}  // namespace dilated
