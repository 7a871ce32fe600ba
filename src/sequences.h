// The only walk over batch elements, cu_seqlens and windows.
#pragma once

#include <vector>

#include "dilated/plan.h"

namespace dilated {

/// The sequences of a legal problem, in order.
std::vector<Sequence> sequences_of(const Problem& problem);

}  // namespace dilated
