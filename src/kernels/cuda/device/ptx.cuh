// Hopper's instructions under short names: barriers of shared memory, bulk tensor copies, register
// budgets. What cuda::ptx has is taken from there.
#pragma once

#include <cstdint>

#include <cuda.h>
#include <cuda/ptx>

namespace dilated::gpu {

namespace ptx = ::cuda::ptx;

__device__ inline std::uint32_t shared_address(const void* pointer) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(pointer));
}

/// An mbarrier in shared memory. Its phases alternate: the k-th completion ends parity k % 2.
class Barrier {
 public:
  __device__ void init(std::uint32_t arrivals) { ptx::mbarrier_init(&word_, arrivals); }
  __device__ void arrive() {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&word_))
                 : "memory");
  }
  /// One arrival that also waits for `bytes` of bulk copies. A box counts in full, also where it
  /// lies out of bounds.
  __device__ void arrive_and_expect(std::uint32_t bytes) {
    asm volatile(
        "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&word_)),
        "r"(bytes)
        : "memory");
  }
  __device__ void wait(std::uint32_t parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "}" ::"r"(shared_address(&word_)),
        "r"(parity)
        : "memory");
  }
  __device__ std::uint64_t* word() { return &word_; }

 private:
  std::uint64_t word_;
};

/// Barriers that were initialised become visible to the copy engine.
__device__ inline void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

/// Ordinary writes to shared memory become visible to the copy engine and to wgmma. Every writing
/// thread calls it before the barrier that hands the memory over.
__device__ inline void fence_async_proxy() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

/// Threads of some warps wait for one another; numbers 1 to 15.
__device__ inline void named_barrier(int number, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

template <int kRegisters>
__device__ inline void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ inline void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

/// Copies one box of a 5-D tensor to shared memory; `barrier` counts its bytes.
__device__ inline void load_box(void* shared, const CUtensorMap& map, int c0, int c1, int c2,
                                int c3, int c4, Barrier& barrier) {
  const std::int32_t coordinates[5] = {c0, c1, c2, c3, c4};
  ptx::cp_async_bulk_tensor(ptx::space_cluster, ptx::space_global, shared, &map, coordinates,
                            barrier.word());
}

/// 2^x, flushing results below the smallest normal number.
__device__ inline float exp2_unit(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace dilated::gpu
