// Entry points of the reference back end.
#pragma once

#include "dilated/attention.h"

namespace dilated::reference {

void attention_forward(const Plan& plan, const ForwardTensors& tensors, const Context& context);
void attention_backward(const Plan& plan, const BackwardTensors& tensors, const Context& context);
/// Doubles of scratch per thread: gradients of one key/value head of the longest sequence.
std::int64_t backward_doubles(const Plan& plan);

}  // namespace dilated::reference
