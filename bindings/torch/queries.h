// Operators without tensors: what Python asks the core (back ends, plans, counts, tables).
#pragma once

#include "bindings/torch/stable_abi.h"

namespace dilated::binding {

/// Adds their schemas to the library `dilated`; queries.cpp registers the kernels.
void define_queries(torch::stable::detail::StableLibrary& library);

}  // namespace dilated::binding
