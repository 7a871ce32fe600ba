// Linked when no CUDA kernels are built: the back end is listed and says why it cannot run.
#include "dilated/error.h"

#include "src/backend_table.h"

namespace dilated {
namespace {

std::string unavailable() { return "this build contains no CUDA kernels"; }

std::string description() { return unavailable(); }

std::string rejects(const Problem&) { return unavailable(); }

// Never reached: make_plan does not choose a back end that rejects the problem.
[[noreturn]] void refuse() {
  reject<Unsupported>("backend", "a back end that was built", "cuda", unavailable());
}
std::shared_ptr<const Decision> decide(const Plan&) { refuse(); }
void run_forward(const Plan&, const ForwardTensors&, const Context&) { refuse(); }
void run_backward(const Plan&, const BackwardTensors&, const Context&) { refuse(); }

}  // namespace

const Backend& cuda_backend() {
  static constexpr Backend kBackend = {"cuda", unavailable, description, rejects,
                                       decide, run_forward, run_backward};
  return kBackend;
}

}  // namespace dilated
