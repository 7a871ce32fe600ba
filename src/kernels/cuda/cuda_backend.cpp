// The CUDA back end: float32, bfloat16 and float16 with float32 accumulation, every option, on
// cards of compute capability 8.0 and newer.
#include <cuda_runtime_api.h>

#include <fmt/format.h>

#include "src/backend_table.h"
#include "src/kernels/cuda/attention_forward_sm90.h"
#include "src/kernels/cuda/call.h"
#include "src/kernels/cuda/decision.h"

namespace dilated {
namespace {

constexpr std::int64_t kMaxHeads = 65535;  // a dimension of launches

/// Asked once: whether a device exists does not change.
std::string unavailable() {
  static const std::string kReason = [] {
    int devices = 0;
    const cudaError_t error = cudaGetDeviceCount(&devices);
    if (error != cudaSuccess) {
      return fmt::format("no CUDA device: {}", cudaGetErrorString(error));
    }
    return std::string(devices > 0 ? "" : "no CUDA device");
  }();
  return kReason;
}

std::string description() { return "CUDA, kernels of sm_80 and sm_90a"; }

/// 10 * major + minor; asked of the driver's tables, which wakes no device.
std::int64_t capability_of(std::int64_t index) {
  int major = 0;
  int minor = 0;
  const auto device = static_cast<int>(index);
  gpu::check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device),
             "compute capability");
  gpu::check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device),
             "compute capability");
  return 10 * std::int64_t{major} + minor;
}

std::string rejects(const Problem& problem) {
  if (problem.device.kind != Device::kCuda) {
    return "tensors are not on a CUDA device";
  }
  if (problem.dtype == DType::kFloat64) {
    return "dtype float64 is left to the reference back end, which runs on the CPU";
  }
  if (problem.head_dim < 1 || problem.head_dim > gpu::kMaxHeadDim) {
    return fmt::format("head_dim {} is not in 1..{}", problem.head_dim, gpu::kMaxHeadDim);
  }
  if (problem.num_heads > kMaxHeads) {
    return fmt::format("{} heads are more than {}", problem.num_heads, kMaxHeads);
  }
  if (static_cast<std::int64_t>(problem.branches.size()) > gpu::kMaxBranches) {
    return fmt::format("{} branches are more than {}", problem.branches.size(), gpu::kMaxBranches);
  }
  if (problem.key_layout == KeyLayout::kClassRows) {
    return "keys by class rows are for the CPU back ends so far";
  }
  return "";
}

std::shared_ptr<const Decision> decide(const Plan& plan) {
  const DeviceSpec& device = plan.problem().device;
  return std::make_shared<gpu::CudaDecision>(
      plan, gpu::Target{.capability = device.capability != 0 ? device.capability
                                                             : capability_of(device.index),
                        .has_sm90 = gpu::sm90::has_kernels()});
}

}  // namespace

const Backend& cuda_backend() {
  static constexpr Backend kBackend = {"cuda",
                                       unavailable,
                                       description,
                                       rejects,
                                       decide,
                                       gpu::attention_forward,
                                       gpu::attention_backward};
  return kBackend;
}

}  // namespace dilated
