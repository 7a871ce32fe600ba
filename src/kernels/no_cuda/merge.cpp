// Linked when no CUDA kernels are built: merging on a CUDA device says why it cannot run.
#include "dilated/error.h"

#include "src/cuda_merge.h"

namespace dilated {
namespace {

[[noreturn]] void refuse() {
  raise<Unsupported>({"merge", "device", "cpu", "cuda", "this build contains no CUDA kernels"});
}

}  // namespace

void cuda_merge(std::span<const Partial>, const TensorView&, const RowView&, const Context&,
                const DeviceSpec&) {
  refuse();
}

void cuda_merge_backward(std::span<const Partial>, const ConstTensorView&, const ConstRowView&,
                         std::span<const PartialGradient>, const Context&, const DeviceSpec&) {
  refuse();
}

}  // namespace dilated
