// The CPU back end: float32, bfloat16 and float16 with float32 accumulation, every option, Google
// Highway.
#include <fmt/format.h>

#include "src/backend_table.h"
#include "src/kernels/cpu/attention.h"
#include "src/kernels/cpu/decision.h"

namespace dilated {
namespace {

constexpr std::int64_t kMaxHeadDim = 256;

std::string unavailable() { return ""; }

std::string description() { return "Highway " + cpu::simd_target(); }

std::string rejects(const Problem& problem) {
  if (problem.device.kind != Device::kCpu) {
    return "tensors are not on the CPU";
  }
  if (problem.dtype == DType::kFloat64) {
    return "dtype float64 is left to the reference back end";
  }
  if (problem.head_dim < 1 || problem.head_dim > kMaxHeadDim) {
    return fmt::format("head_dim {} is not in 1..{}", problem.head_dim, kMaxHeadDim);
  }
  return "";
}

std::shared_ptr<const Decision> decide(const Plan& plan) {
  return std::make_shared<cpu::CpuDecision>(plan.problem());
}

}  // namespace

const Backend& cpu_backend() {
  static constexpr Backend kBackend = {"cpu",
                                       unavailable,
                                       description,
                                       rejects,
                                       decide,
                                       cpu::attention_forward,
                                       cpu::attention_backward};
  return kBackend;
}

}  // namespace dilated
