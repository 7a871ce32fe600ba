// The forward kernels of float32.
#include "src/kernels/cuda/attention_forward_sm80.cuh"

namespace dilated::gpu {

template void branches_forward<float>(const ForwardArguments&, const CudaDecision&, cudaStream_t);

}  // namespace dilated::gpu
