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
  if (problem.device.kind != Device::kCpu) {
    return "tensors are not on the CPU";
  }
  if (problem.dtype != DType::kFloat32 && problem.dtype != DType::kFloat64) {
    return fmt::format("dtype {} is not float32 or float64", name_of(problem.dtype));
  }
  return "";
}

/// Forward needs no scratch; backward 16 * most key rows of a sequence * head_dim bytes per thread.
class ReferenceDecision final : public Decision {
 public:
  explicit ReferenceDecision(const Plan& plan)
      : threads_(plan.problem().device.units > 0 ? plan.problem().device.units
                                                 : default_parallel_for().num_threads()),
        backward_doubles_(reference::backward_doubles(plan)) {}

  std::int64_t workspace_bytes(Pass pass) const override {
    return pass == Pass::kForward
               ? 0
               : threads_ * backward_doubles_ * static_cast<std::int64_t>(sizeof(double));
  }
  std::string to_string() const override { return fmt::format("threads       {}\n", threads_); }

 private:
  std::int64_t threads_;
  std::int64_t backward_doubles_;
};

std::shared_ptr<const Decision> decide(const Plan& plan) {
  return std::make_shared<ReferenceDecision>(plan);
}

}  // namespace

const Backend& reference_backend() {
  static constexpr Backend kBackend = {"reference",
                                       unavailable,
                                       description,
                                       rejects,
                                       decide,
                                       reference::attention_forward,
                                       reference::attention_backward};
  return kBackend;
}

}  // namespace dilated
