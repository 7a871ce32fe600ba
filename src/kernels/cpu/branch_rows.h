// Rows of saved branch results that no position uses.
#pragma once

#include "dilated/attention.h"
#include "dilated/plan.h"

namespace dilated::cpu {

/// Writes 0 and -inf to them. Nothing to do where no branch results are saved.
void clear_unused_branch_rows(const Plan& plan, const ForwardTensors& tensors,
                              const ParallelFor& threads);

}  // namespace dilated::cpu
