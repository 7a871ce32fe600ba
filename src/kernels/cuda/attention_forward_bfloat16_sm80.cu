// The forward kernels of bfloat16.
#include "src/kernels/cuda/attention_forward_sm80.cuh"

namespace dilated::gpu {

template void branches_forward<__nv_bfloat16>(const ForwardArguments&, const CudaDecision&,
                                              cudaStream_t);

}  // namespace dilated::gpu
