// Forward of bfloat16 on Hopper.
#include "src/kernels/cuda/attention_forward_sm90.cuh"

namespace dilated::gpu::sm90 {

template void run_forward<__nv_bfloat16>(const ForwardArguments&, bool, cudaStream_t);

}  // namespace dilated::gpu::sm90
