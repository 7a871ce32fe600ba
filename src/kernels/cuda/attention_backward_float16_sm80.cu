// The backward kernels of float16.
#include "src/kernels/cuda/attention_backward_sm80.cuh"

namespace dilated::gpu {

template void branches_backward<__half>(const BackwardArguments&, const CudaDecision&,
                                        cudaStream_t);

}  // namespace dilated::gpu
