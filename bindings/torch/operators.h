// The operators of the library "dilated", by the file that implements them.
#pragma once

#include "bindings/torch/stable_abi.h"

namespace dilated::binding {

using Library = torch::stable::detail::StableLibrary;

/// Schemas.
void define_attention(Library& library);  // attention_ops.cpp
void define_merge(Library& library);      // merge_ops.cpp
void define_queries(Library& library);    // queries.cpp
void define_exchange(Library& library);   // exchange_ops.cpp

/// Kernels that take tensors, for every device; what the device cannot do is said by the core.
void implement_attention(Library& library);
void implement_merge(Library& library);
/// Kernels that read no tensor memory.
void implement_queries(Library& library);
void implement_exchange(Library& library);

}  // namespace dilated::binding
