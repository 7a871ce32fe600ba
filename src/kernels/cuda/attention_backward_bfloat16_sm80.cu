// The backward kernels of bfloat16.
#include "src/kernels/cuda/attention_backward_sm80.cuh"

namespace dilated::gpu {

template void branches_backward<__nv_bfloat16>(const BackwardArguments&, const CudaDecision&,
                                               cudaStream_t);

}  // namespace dilated::gpu
