// The CPU back end: float32, bfloat16 and float16 with float32 accumulation, every option, Google
// Highway.
#include <fmt/format.h>

#include "src/backend_table.h"
#include "src/kernels/cpu/attention.h"
#include "src/kernels/cpu/scratch.h"

namespace dilated {
namespace {

constexpr std::int64_t kMaxHeadDim = 256;

std::string unavailable() { return ""; }

std::string description() { return "Highway " + cpu::simd_target(); }

std::string rejects(const Problem& problem) {
  if (problem.device != Device::kCpu) {
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

/// threads * tiles of one thread (scratch.h: 2 MB at head_dim 64, at most 5.4 MB), plus, in the
/// backward pass of 16-bit dtypes, float32 gradients of the whole call: 4 * batch * seqlen *
/// head_dim * (num_heads + 2 * num_kv_heads) bytes.
std::int64_t workspace_bytes(const Plan& plan, Pass pass, int threads) {
  const Problem& problem = plan.problem();
  if (pass == Pass::kForward) {
    return threads * cpu::scratch_bytes<cpu::ForwardScratch>(problem, threads);
  }
  return threads * cpu::scratch_bytes<cpu::BackwardScratch>(problem) + cpu::gradient_bytes(problem);
}

}  // namespace

const Backend& cpu_backend() {
  static constexpr Backend kBackend = {"cpu",
                                       unavailable,
                                       description,
                                       rejects,
                                       workspace_bytes,
                                       cpu::attention_forward,
                                       cpu::attention_backward};
  return kBackend;
}

}  // namespace dilated
