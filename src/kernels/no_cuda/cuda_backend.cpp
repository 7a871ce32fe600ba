// Linked when no CUDA kernels are built: the back end is listed and says why it cannot run.
#include "src/backend_table.h"

namespace dilated {
namespace {

std::string unavailable() { return "this build contains no CUDA kernels"; }

std::string description() { return unavailable(); }

std::string rejects(const Problem&) { return unavailable(); }

std::int64_t workspace_bytes(const Plan&, Pass, int) { return 0; }

// Never reached: make_plan does not choose a back end that rejects the problem.
void run_forward(const Plan&, const ForwardTensors&, const Context&) {}
void run_backward(const Plan&, const BackwardTensors&, const Context&) {}

}  // namespace

const Backend& cuda_backend() {
  static constexpr Backend kBackend = {"cuda",          unavailable, description, rejects,
                                       workspace_bytes, run_forward, run_backward};
  return kBackend;
}

}  // namespace dilated
