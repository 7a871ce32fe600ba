// The backward kernels of float32.
#include "src/kernels/cuda/attention_backward_sm80.cuh"

namespace dilated::gpu {

template void branches_backward<float>(const BackwardArguments&, const CudaDecision&, cudaStream_t);

}  // namespace dilated::gpu
