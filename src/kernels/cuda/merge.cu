// merge and its gradient (src/merge.cpp) on the device: one warp per row, sums in float64, parts in
// their order.
#include <algorithm>
#include <string>

#include "dilated/error.h"

#include "src/cuda_merge.h"
#include "src/kernels/cuda/device/element.cuh"
#include "src/kernels/cuda/device/launch.cuh"
#include "src/merge.h"

namespace dilated {
namespace gpu {
namespace {

constexpr int kFewParts = 8;
constexpr int kMostParts = 100;  // arguments of a launch have at most 32764 bytes
constexpr int kThreads = 256;

template <int kParts>
struct MergeArguments {
  Partial parts[kParts];
  int count;
  TensorView out;
  RowView lse;
};

template <int kParts>
struct GradientArguments {
  Partial parts[kParts];
  PartialGradient gradients[kParts];
  int count;
  ConstTensorView dout;
  ConstRowView dlse;
};
static_assert(sizeof(GradientArguments<kMostParts>) <= 32764);

/// A row of one (batch, row, head), and this thread's place in its warp.
struct At {
  std::int64_t batch, row, head;
  int lane;
};

/// Calls body(at) for the rows of this warp.
template <typename Body>
__device__ void for_each_row(const std::array<std::int64_t, 4>& shape, const Body& body) {
  const std::int64_t rows = shape[0] * shape[1] * shape[2];
  const std::int64_t warps = std::int64_t{gridDim.x} * (kThreads / 32);
  for (std::int64_t i = std::int64_t{blockIdx.x} * (kThreads / 32) + threadIdx.x / 32; i < rows;
       i += warps) {
    body(At{i / (shape[1] * shape[2]), i / shape[2] % shape[1], i % shape[2],
            static_cast<int>(threadIdx.x) % 32});
  }
}

__device__ double load(const ConstTensorView& view, const At& at, int column) {
  const std::byte* const row = rows_of(view, at.batch, at.head).row(at.row);
  return view.dtype == DType::kFloat64 ? reinterpret_cast<const double*>(row)[column]
                                       : double{load_element(row, view.dtype, column)};
}

__device__ void store(const TensorView& view, const At& at, int column, double value) {
  std::byte* const row = rows_of(view, at.batch, at.head).row(at.row);
  switch (view.dtype) {
    case DType::kFloat64:
      reinterpret_cast<double*>(row)[column] = value;
      break;
    case DType::kBFloat16:  // from float64 at once: rounding twice may go the other way
      reinterpret_cast<__nv_bfloat16*>(row)[column] = __double2bfloat16(value);
      break;
    case DType::kFloat16:
      reinterpret_cast<__half*>(row)[column] = __double2half(value);
      break;
    default:
      reinterpret_cast<float*>(row)[column] = static_cast<float>(value);
  }
}

template <typename View>
__device__ std::int64_t offset_of(const View& view, const At& at) {
  return at.batch * view.strides[0] + at.head * view.strides[1] + at.row * view.strides[2];
}

__device__ double load(const ConstRowView& view, const At& at) {
  return view.dtype == DType::kFloat64
             ? static_cast<const double*>(view.data)[offset_of(view, at)]
             : double{static_cast<const float*>(view.data)[offset_of(view, at)]};
}

__device__ void store(const RowView& view, const At& at, double value) {
  if (view.dtype == DType::kFloat64) {
    static_cast<double*>(view.data)[offset_of(view, at)] = value;
  } else {
    static_cast<float*>(view.data)[offset_of(view, at)] = static_cast<float>(value);
  }
}

__device__ double merged_lse(const Partial* parts, int count, const At& at) {
  ScaledSum<double> total;
  for (int i = 0; i < count; ++i) {
    const ScaledSum<double> part{load(parts[i].lse, at), 1.0};
    total = merge_sums(total, part, [](double x) { return exp(x); }).total;
  }
  return total.max == kAbsentLse<double> ? total.max : total.max + log(total.sum);
}

/// e^(l_i - L); 0 for an absent row, which may hold anything.
__device__ double weight_of(const Partial& part, double lse, const At& at) {
  const double part_lse = load(part.lse, at);
  return part_lse == kAbsentLse<double> ? 0.0 : exp(part_lse - lse);
}

template <int kParts>
__global__ void __launch_bounds__(kThreads)
    merge_kernel(const __grid_constant__ MergeArguments<kParts> arguments) {
  for_each_row(arguments.out.shape, [&](const At& at) {
    const double lse = merged_lse(arguments.parts, arguments.count, at);
    for (int c = at.lane; c < arguments.out.shape[3]; c += 32) {
      double sum = 0.0;
      for (int i = 0; i < arguments.count; ++i) {
        const double weight = weight_of(arguments.parts[i], lse, at);
        if (weight != 0.0) {
          sum += weight * load(arguments.parts[i].out, at, c);
        }
      }
      store(arguments.out, at, c, sum);
    }
    if (at.lane == 0) {
      store(arguments.lse, at, lse);
    }
  });
}

template <int kParts>
__global__ void __launch_bounds__(kThreads)
    gradient_kernel(const __grid_constant__ GradientArguments<kParts> arguments) {
  const auto columns = static_cast<int>(arguments.dout.shape[3]);
  for_each_row(arguments.dout.shape, [&](const At& at) {
    const double lse = merged_lse(arguments.parts, arguments.count, at);
    const auto dot = [&](int i) {  // dO.O_i
      double sum = 0.0;
      for (int c = at.lane; c < columns; c += 32) {
        sum += load(arguments.dout, at, c) * load(arguments.parts[i].out, at, c);
      }
      for (int distance = 16; distance > 0; distance /= 2) {
        sum += __shfl_xor_sync(0xFFFFFFFFu, sum, distance);
      }
      return sum;
    };
    double delta = 0.0;  // dO.O
    for (int i = 0; i < arguments.count; ++i) {
      const double weight = weight_of(arguments.parts[i], lse, at);
      delta += weight == 0.0 ? 0.0 : weight * dot(i);
    }
    const double dlse = arguments.dlse.defined() ? load(arguments.dlse, at) : 0.0;
    for (int i = 0; i < arguments.count; ++i) {
      const PartialGradient& gradient = arguments.gradients[i];
      const double weight = weight_of(arguments.parts[i], lse, at);
      for (int c = at.lane; c < columns; c += 32) {
        store(gradient.out, at, c, weight == 0.0 ? 0.0 : weight * load(arguments.dout, at, c));
      }
      const double row = weight == 0.0 ? 0.0 : weight * (dot(i) - delta + dlse);
      if (at.lane == 0) {
        store(gradient.lse, at, row);
      }
    }
  });
}

/// One block per 8 rows, as far as blocks are useful.
Grid grid_of(const std::array<std::int64_t, 4>& shape) {
  constexpr std::int64_t kMostBlocks = 65536;
  return {std::min((shape[0] * shape[1] * shape[2] + kThreads / 32 - 1) / (kThreads / 32),
                   kMostBlocks)};
}

void check_count(std::size_t parts) {
  if (parts > kMostParts) {
    raise<Unsupported>({"merge", "parts", "at most 100 on a CUDA device", std::to_string(parts),
                        "merge groups of them, and then the results"});
  }
}

template <int kParts>
void run_merge(std::span<const Partial> parts, const TensorView& out, const RowView& lse,
               cudaStream_t stream) {
  MergeArguments<kParts> arguments{
      .parts = {}, .count = static_cast<int>(parts.size()), .out = out, .lse = lse};
  std::copy(parts.begin(), parts.end(), arguments.parts);
  launch(merge_kernel<kParts>, grid_of(out.shape), kThreads, 0, stream, arguments, "merge");
}

template <int kParts>
void run_gradient(std::span<const Partial> parts, const ConstTensorView& dout,
                  const ConstRowView& dlse, std::span<const PartialGradient> gradients,
                  cudaStream_t stream) {
  GradientArguments<kParts> arguments{.parts = {},
                                      .gradients = {},
                                      .count = static_cast<int>(parts.size()),
                                      .dout = dout,
                                      .dlse = dlse};
  std::copy(parts.begin(), parts.end(), arguments.parts);
  std::copy(gradients.begin(), gradients.end(), arguments.gradients);
  launch(gradient_kernel<kParts>, grid_of(dout.shape), kThreads, 0, stream, arguments,
         "merge_backward");
}

}  // namespace
}  // namespace gpu

void cuda_merge(std::span<const Partial> parts, const TensorView& out, const RowView& lse,
                const Context& context, const DeviceSpec& device) {
  gpu::check_count(parts.size());
  const gpu::DeviceGuard guard(device.index);
  const auto run = parts.size() <= gpu::kFewParts ? gpu::run_merge<gpu::kFewParts>
                                                  : gpu::run_merge<gpu::kMostParts>;
  run(parts, out, lse, gpu::stream_of(context));
}

void cuda_merge_backward(std::span<const Partial> parts, const ConstTensorView& dout,
                         const ConstRowView& dlse, std::span<const PartialGradient> gradients,
                         const Context& context, const DeviceSpec& device) {
  gpu::check_count(parts.size());
  const gpu::DeviceGuard guard(device.index);
  const auto run = parts.size() <= gpu::kFewParts ? gpu::run_gradient<gpu::kFewParts>
                                                  : gpu::run_gradient<gpu::kMostParts>;
  run(parts, dout, dlse, gradients, gpu::stream_of(context));
}

}  // namespace dilated
