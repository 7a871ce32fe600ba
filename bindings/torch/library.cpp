// Registration: every operator, for the CPU and for CUDA.
#include "bindings/torch/operators.h"

namespace dilated::binding {
namespace {

void implement_kernels(Library& library) {
  implement_attention(library);
  implement_merge(library);
}

}  // namespace

STABLE_TORCH_LIBRARY(dilated, library) {
  define_attention(library);
  define_merge(library);
  define_queries(library);
  define_exchange(library);
}

STABLE_TORCH_LIBRARY_IMPL(dilated, CPU, library) { implement_kernels(library); }

STABLE_TORCH_LIBRARY_IMPL(dilated, CUDA, library) { implement_kernels(library); }

STABLE_TORCH_LIBRARY_IMPL(dilated, CompositeExplicitAutograd, library) {
  implement_queries(library);
  implement_exchange(library);
}

}  // namespace dilated::binding
