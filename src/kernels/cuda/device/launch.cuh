// Launches with as much shared memory as a kernel asks for.
#pragma once

#include <cstdint>

#include <cuda_runtime.h>

#include "dilated/attention.h"

#include "src/kernels/cuda/call.h"

namespace dilated::gpu {

inline cudaStream_t stream_of(const Context& context) {
  return static_cast<cudaStream_t>(context.stream);
}

/// Of the current device.
inline int count_multiprocessors() {
  int device = 0;
  int count = 0;
  check(cudaGetDevice(&device), "device");
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "multiprocessors");
  return count;
}

/// Blocks of a launch: x up to 2^31 - 1, y up to 65535. Nothing is launched for none.
struct Grid {
  std::int64_t x;
  std::int64_t y = 1;
};

template <typename Arguments>
void launch(void (*kernel)(Arguments), const Grid& grid, int threads, int shared_bytes,
            cudaStream_t stream, const Arguments& arguments, const char* what) {
  if (grid.x == 0 || grid.y == 0) {
    return;
  }
  check(grid.x > 0x7FFFFFFF ? cudaErrorInvalidConfiguration : cudaSuccess, what);
  constexpr int kAlways = 48 * 1024;  // what every kernel may have unasked
  if (shared_bytes > kAlways) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
          what);
  }
  const dim3 blocks(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y));
  kernel<<<blocks, static_cast<unsigned>(threads), static_cast<unsigned>(shared_bytes), stream>>>(
      arguments);
  check(cudaGetLastError(), what);
}

}  // namespace dilated::gpu
