// Entry points of the CPU back end, dispatched to the best SIMD target at run time.
#pragma once

#include <string>

#include "dilated/attention.h"

namespace dilated::cpu {

void attention_forward(const Plan& plan, const ForwardTensors& tensors, const Context& context);
void attention_backward(const Plan& plan, const BackwardTensors& tensors, const Context& context);
/// Name of the SIMD target that runs on this machine.
std::string simd_target();

}  // namespace dilated::cpu
