// Linked when DILATED_CUDA_ARCHITECTURES has no 90a: decisions say so.
#include <stdexcept>

#include "src/kernels/cuda/attention_backward_sm90.h"
#include "src/kernels/cuda/attention_forward_sm90.h"

namespace dilated::gpu::sm90 {

bool has_kernels() { return false; }

// Never reached: no decision chooses them.
void branches_forward(const ForwardCall&, const Plan&, cudaStream_t) {
  throw std::logic_error("dilated: forward of sm_90a was not built");
}
void branches_backward(const gpu::BackwardArguments&, const GradientParts&, const Plan&, int*,
                       cudaStream_t) {
  throw std::logic_error("dilated: backward of sm_90a was not built");
}

}  // namespace dilated::gpu::sm90
