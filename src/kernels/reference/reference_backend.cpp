// The reference back end: the definition as loops, float32 and float64, every option, double
// accumulation.
#include <fmt/format.h>

#include "src/backend_table.h"
#include "src/kernels/reference/attention.h"

namespace dilated {
namespace {

std::string unavailable() { return ""; }

std::string description() { return "the definition as loops, double accumulation"; }

std::string rejects(const Problem& problem) {
  if (problem.device != Device::kCpu) {
    return "tensors are not on the CPU";
  }
  if (problem.dtype != DType::kFloat32 && problem.dtype != DType::kFloat64) {
    return fmt::format("dtype {} is not float32 or float64", name_of(problem.dtype));
  }
  return "";
}

/// Forward needs none; backward 16 * longest sequence * head_dim bytes per thread.
std::int64_t workspace_bytes(const Plan& plan, Pass pass, int threads) {
  return pass == Pass::kForward ? 0
                                : threads * reference::backward_doubles(plan) *
                                      static_cast<std::int64_t>(sizeof(double));
}

}  // namespace

const Backend& reference_backend() {
  static constexpr Backend kBackend = {"reference",
                                       unavailable,
                                       description,
                                       rejects,
                                       workspace_bytes,
                                       reference::attention_forward,
                                       reference::attention_backward};
  return kBackend;
}

}  // namespace dilated
