// Backward of bfloat16 on Hopper.
#include "src/kernels/cuda/attention_backward_sm90.cuh"

namespace dilated::gpu::sm90 {

template void run_gradients<__nv_bfloat16>(const GradientArguments&, const GradientArguments&, int,
                                cudaStream_t);

}  // namespace dilated::gpu::sm90
