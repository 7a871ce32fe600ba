// Backward of bfloat16 on Hopper.
#include "src/kernels/cuda/attention_backward_sm90.cuh"

namespace dilated::gpu::sm90 {

template void run_gradient<QueryGradient, __nv_bfloat16>(const GradientArguments&, cudaStream_t);
template void run_gradient<KeyGradient, __nv_bfloat16>(const GradientArguments&, cudaStream_t);

}  // namespace dilated::gpu::sm90
