// Compiled, never run: does this CUDA toolchain take what the kernels will use? C++20 (concepts,
// templated lambdas that launch), __grid_constant__ arguments, and geometry.h as device code.
#include <concepts>
#include <cstdint>

#include "src/geometry.h"

namespace {

struct Arguments {
  std::int64_t length;
  std::int64_t segment;
  std::int64_t dilation;
  std::int64_t residue;
  float* out;
};

template <typename Element>
concept FloatingElement = std::floating_point<Element>;

template <FloatingElement Element, int kThreads>
__global__ void __launch_bounds__(kThreads)
    probe_kernel(const __grid_constant__ Arguments arguments) {
  const dilated::BranchGeometry branch(arguments.length, arguments.segment, arguments.dilation);
  const std::int64_t position = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (position < arguments.length) {
    const bool covered = branch.covers(position, arguments.residue);
    arguments.out[position] = covered ? static_cast<Element>(branch.row_of(position)) : Element(-1);
  }
}

}  // namespace

void launch_probe(const Arguments& arguments, cudaStream_t stream) {
  const auto launch = [&]<int kThreads>() {
    const auto blocks = static_cast<unsigned>(dilated::ceil_div(arguments.length, kThreads));
    probe_kernel<float, kThreads><<<blocks, kThreads, 0, stream>>>(arguments);
  };
  launch.operator()<128>();
}
