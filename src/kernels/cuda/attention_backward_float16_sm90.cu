// Backward of float16 on Hopper.
#include "src/kernels/cuda/attention_backward_sm90.cuh"

namespace dilated::gpu::sm90 {

template void run_query_gradient<__half>(const GradientArguments&, cudaStream_t);
template void run_key_gradient<__half>(const GradientArguments&, cudaStream_t);

}  // namespace dilated::gpu::sm90
