// ParallelFor on torch's threads: no second pool.
#include <algorithm>

#include "bindings/torch/stable_abi.h"

namespace dilated::binding {

TorchParallelFor::TorchParallelFor()
    : num_threads_(std::max(1, static_cast<int>(torch::stable::get_num_threads()))) {}

void TorchParallelFor::run(int threads, const Body& body) const {
  // One item per thread. Inside another parallel region torch runs all of them in one call.
  torch::stable::parallel_for(0, threads, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t thread = begin; thread < end; ++thread) {
      body(static_cast<int>(thread));
    }
  });
}

}  // namespace dilated::binding
