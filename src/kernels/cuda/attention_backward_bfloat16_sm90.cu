// Backward of bfloat16 on Hopper.
#include "src/kernels/cuda/attention_backward_sm90.cuh"

namespace dilated::gpu::sm90 {

template void run_query_gradient<__nv_bfloat16>(const GradientArguments&, cudaStream_t);
template void run_key_gradient<__nv_bfloat16>(const GradientArguments&, cudaStream_t);

}  // namespace dilated::gpu::sm90
