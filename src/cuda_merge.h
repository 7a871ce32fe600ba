// Merging on a CUDA device. Views have been checked; memory is the device's. In a build without
// CUDA kernels both raise Unsupported.
#pragma once

#include <span>

#include "dilated/merge.h"

namespace dilated {

/// Throws Unsupported for more parts than one launch takes.
void cuda_merge(std::span<const Partial> parts, const TensorView& out, const RowView& lse,
                const Context& context, const DeviceSpec& device);

void cuda_merge_backward(std::span<const Partial> parts, const ConstTensorView& dout,
                         const ConstRowView& dlse, std::span<const PartialGradient> gradients,
                         const Context& context, const DeviceSpec& device);

}  // namespace dilated
