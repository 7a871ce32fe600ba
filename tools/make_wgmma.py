"""Writes src/kernels/cuda/device/wgmma.cuh: assembly operand lists, which templates cannot expand.

python tools/make_wgmma.py | clang-format > src/kernels/cuda/device/wgmma.cuh
"""

from __future__ import annotations

WIDTHS = (32, 48, 64, 96, 128)

HEAD = """\
// Warpgroup matrix products (wgmma), 64 rows, 16 products deep; written by tools/make_wgmma.py.
//   accumulator[N / 2]: thread t of the warpgroup holds, for j < N / 8, the columns
//   8 j + 2 (t % 4) + {0, 1} of rows 16 (t / 32) + t % 32 / 4 (elements 4 j + {0, 1}) and 8 rows
//   below (elements 4 j + {2, 3}).
#pragma once

#include <cstdint>
#include <type_traits>

#include <cuda_bf16.h>

#include "src/kernels/cuda/device/ptx.cuh"

namespace dilated::gpu {

/// Rows of 128 bytes in shared memory, swizzled by 128 bytes, as the copy engine writes them. For
/// an operand whose products run along the row, `panel_stride` has no meaning; for a transposed one
/// it is the distance between panels of 64 columns.
__device__ inline std::uint64_t operand_of(const void* shared, std::uint32_t panel_stride = 16) {
  constexpr std::uint64_t kSwizzle128 = 1;
  constexpr std::uint64_t kGroupStride = 1024;  // 8 rows
  return (shared_address(shared) & 0x3FFFF) >> 4 | std::uint64_t{panel_stride >> 4} << 16 |
         kGroupStride >> 4 << 32 | kSwizzle128 << 62;
}
/// The same operand `bytes` further on.
__device__ inline std::uint64_t advance(std::uint64_t operand, std::uint32_t bytes) {
  return operand + (bytes >> 4);
}

__device__ inline void begin_products() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ inline void commit_products() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
/// Waits until at most `kPending` committed groups are under way.
template <int kPending>
__device__ inline void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
/// The compiler may not move reads or writes of `registers` across this point.
template <typename Register, int kCount>
__device__ inline void pin(Register (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if constexpr (std::is_same_v<Register, float>) {
      asm volatile("" : "+f"(registers[i])::"memory");
    } else {
      asm volatile("" : "+r"(registers[i])::"memory");
    }
  }
}

/// acc = a b + (accumulate ? acc : 0), acc 64 x N. kTransposed: b lies as rows of depth.
template <typename Element, int kWidth, bool kTransposed>
struct Product;
"""


def statement(width: int, kind: str, registers: bool) -> str:
    """One asm statement of the given width, dtype and kind of first operand."""
    count = width // 2
    outputs = ", ".join(f"%{i}" for i in range(count))
    a = "{" + ", ".join(f"%{count + i}" for i in range(4)) + "}" if registers else f"%{count}"
    next_operand = count + (4 if registers else 1)
    b, flag, transposed = (f"%{next_operand + i}" for i in range(3))
    order = f"1, 1, {transposed}" if registers else f"1, 1, 0, {transposed}"
    accumulators = ", ".join(f'"+f"(acc[{i}])' for i in range(count))
    first = ", ".join(f'"r"(a[{i}])' for i in range(4)) if registers else '"l"(a)'
    return f"""\
      asm volatile(
          "{{\\n"
          ".reg .pred accumulate;\\n"
          "setp.ne.b32 accumulate, {flag}, 0;\\n"
          "wgmma.mma_async.sync.aligned.m64n{width}k16.f32.{kind}.{kind} "
          "{{{outputs}}}, "
          "{a}, {b}, accumulate, {order};\\n"
          "}}"
          : {accumulators}
          : {first}, "l"(b), "r"(static_cast<int>(accumulate)), "n"(static_cast<int>(kTransposed)));
"""


def product(width: int) -> str:
    """The specialisation for one width."""
    lines = [
        "template <typename Element, bool kTransposed>\n"
        f"struct Product<Element, {width}, kTransposed> {{\n"
    ]
    for registers in (False, True):
        a = "const std::uint32_t (&a)[4]" if registers else "std::uint64_t a"
        lines.append(
            f"  __device__ static void run(float (&acc)[{width // 2}], {a}, std::uint64_t b,\n"
            "                             bool accumulate) {\n"
            "    if constexpr (std::is_same_v<Element, __nv_bfloat16>) {\n"
            + statement(width, "bf16", registers)
            + "    } else {\n"
            + statement(width, "f16", registers)
            + "    }\n  }\n"
        )
    return "".join(lines) + "};\n"


def main() -> None:
    """Prints the header."""
    print(HEAD)
    print("// clang-format off")
    print("\n".join(product(width) for width in WIDTHS))
    print("// clang-format on\n\n}  // namespace dilated::gpu")


if __name__ == "__main__":
    main()
