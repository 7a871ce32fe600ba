// Tiles of rows in shared memory and the two products that all kernels are made of. A warp owns 16
// rows of the result, in the accumulator layout of mma.sync m16n8k16: lane 4 g + t holds rows g and
// g + 8, columns 8 j + 2 t and 8 j + 2 t + 1, as sums[j][0..1] and sums[j][2..3].
//   multiply_rows     sums = A B^T   A and B in shared memory, one row per query or key
//   add_product       sums += A B    A in this layout in registers, B in shared memory
// float32 uses multiply-adds in ascending order of the inner dimension, never TF32.
#pragma once

#include <cstddef>
#include <cstdint>

#include "src/geometry.h"
#include "src/kernels/cuda/device/element.cuh"

namespace dilated::gpu {

inline constexpr int kWarpRows = 16;

/// Rows lie 16 bytes further apart than they are long, so that 16-byte pieces of eight rows fall
/// into different banks.
template <typename Element_, int kRows_, int kColumns_>
struct SharedTile {
  using Element = Element_;
  static constexpr int kRows = kRows_;
  static constexpr int kColumns = kColumns_;
  static constexpr int kPerPiece = 16 / static_cast<int>(sizeof(Element));
  static constexpr int kStride = kColumns + kPerPiece;

  alignas(16) Element data[kRows * kStride];

  __device__ Element* row(int i) { return data + i * kStride; }
  __device__ const Element* row(int i) const { return data + i * kStride; }
};

__device__ inline std::uint32_t shared_offset(const void* pointer) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(pointer));
}

/// Starts a copy of 16 bytes to shared memory; zeros, and no access to `from`, if not `present`.
__device__ inline void copy_16_bytes(void* to, const void* from, bool present) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_offset(to)), "l"(from),
               "r"(present ? 16 : 0)
               : "memory");
}
/// Copies since the last call become a group.
__device__ inline void close_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
/// Waits for all groups but the last `kPending`.
template <int kPending>
__device__ inline void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

/// Rows [first, first + kRows) of a class, zeros for rows from `last` on, rows that do not take
/// part, and columns from head_dim on. Complete after wait_for_copies and a barrier.
template <int kThreads, typename Tile, typename TakesPart>
__device__ void load_tile(Tile& tile, const Rows<const std::byte>& rows, const RowSpan& span,
                          std::int64_t first, std::int64_t last, int head_dim, bool by_16_bytes,
                          const TakesPart& takes_part) {
  using Element = typename Tile::Element;
  const auto count = static_cast<int>(min(last - first, std::int64_t{Tile::kRows}));
  const std::int64_t at = span.row(first);  // row i of the tile is row at + i step of the tensor
  const std::byte* const from = rows.row(at);
  const std::int64_t step = span.step * rows.stride;
  const auto present = [&](int i) { return i < count && takes_part(at + i * span.step); };
  if (by_16_bytes && rows.dtype == kDTypeOf<Element>) {
    constexpr int kPieces = Tile::kColumns / Tile::kPerPiece;
    static_assert(kThreads % kPieces == 0);
    constexpr int kRowsAtOnce = kThreads / kPieces;
    const int column = static_cast<int>(threadIdx.x) % kPieces * Tile::kPerPiece;
    const int begin = static_cast<int>(threadIdx.x) / kPieces;
#pragma unroll
    for (int i = 0; i < Tile::kRows; i += kRowsAtOnce) {
      const int row = i + begin;
      if (Tile::kRows % kRowsAtOnce != 0 && row >= Tile::kRows) {
        break;
      }
      const bool copies = column < head_dim && present(row);
      copy_16_bytes(tile.row(row) + column,
                    copies ? from + row * step + column * sizeof(Element) : rows.data, copies);
    }
  } else {
    for (int i = static_cast<int>(threadIdx.x); i < Tile::kRows * Tile::kColumns; i += kThreads) {
      const int row = i / Tile::kColumns;
      const int column = i % Tile::kColumns;
      const float value = column < head_dim && present(row)
                              ? load_element(from + row * step, rows.dtype, column)
                              : 0.0f;
      tile.row(row)[column] = element_of<Element>(value);
    }
  }
}

template <typename Element>
__device__ inline void multiply_add_16(float (&sums)[4], const std::uint32_t (&a)[4],
                                       std::uint32_t b0, std::uint32_t b1) {
  if constexpr (std::is_same_v<Element, __nv_bfloat16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

/// Four 8 x 8 matrices of 16-bit elements; lane l names the row l % 8 of matrix l / 8.
template <bool kTransposed>
__device__ inline void load_matrices(std::uint32_t (&matrices)[4], const void* row) {
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
                 : "r"(shared_offset(row))
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
                 : "r"(shared_offset(row))
                 : "memory");
  }
}

template <typename Element>
__device__ inline std::uint32_t pack(float low, float high) {
  if constexpr (std::is_same_v<Element, __nv_bfloat16>) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const std::uint32_t&>(pair);
  } else {
    const __half2 pair = __floats2half2_rn(low, high);
    return reinterpret_cast<const std::uint32_t&>(pair);
  }
}

/// sums = A B^T, where this warp's rows of A begin at `warp_row`. Swapping A and B transposes the
/// result and changes no bit of it.
template <typename A, typename B>
__device__ void multiply_rows(float (&sums)[B::kRows / 8][4], const A& a, int warp_row,
                              const B& b) {
  using Element = typename A::Element;
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (auto& four : sums) {
#pragma unroll
    for (float& x : four) {
      x = 0.0f;
    }
  }
  if constexpr (std::is_same_v<Element, float>) {
    const int group = lane / 4;
    const int pair = 2 * (lane % 4);
#pragma unroll 2
    for (int k = 0; k < A::kColumns; k += 4) {
      const auto low = *reinterpret_cast<const float4*>(a.row(warp_row + group) + k);
      const auto high = *reinterpret_cast<const float4*>(a.row(warp_row + group + 8) + k);
#pragma unroll
      for (int j = 0; j < B::kRows / 8; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const auto column = *reinterpret_cast<const float4*>(b.row(8 * j + pair + e) + k);
          const auto add = [&column](const float4& row, float& sum) {
            sum = fmaf(row.x, column.x, sum);
            sum = fmaf(row.y, column.y, sum);
            sum = fmaf(row.z, column.z, sum);
            sum = fmaf(row.w, column.w, sum);
          };
          add(low, sums[j][e]);
          add(high, sums[j][2 + e]);
        }
      }
    }
  } else {
    const int matrix = lane / 8;
    const int row = lane % 8;
#pragma unroll
    for (int k = 0; k < A::kColumns; k += 16) {
      std::uint32_t left[4];
      load_matrices<false>(left, a.row(warp_row + matrix % 2 * 8 + row) + k + matrix / 2 * 8);
#pragma unroll
      for (int j = 0; j < B::kRows / 8; j += 2) {
        std::uint32_t right[4];
        load_matrices<false>(right, b.row(8 * j + matrix / 2 * 8 + row) + k + matrix % 2 * 8);
        multiply_add_16<Element>(sums[j], left, right[0], right[1]);
        multiply_add_16<Element>(sums[j + 1], left, right[2], right[3]);
      }
    }
  }
}

/// sums += A B, A rounded to the elements of B.
template <typename B>
__device__ void add_product(float (&sums)[B::kColumns / 8][4], const float (&a)[B::kRows / 8][4],
                            const B& b) {
  using Element = typename B::Element;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  if constexpr (std::is_same_v<Element, float>) {
    const int pair = 2 * (lane % 4);
#pragma unroll
    for (int k = 0; k < B::kRows; ++k) {
      const int holder = (lane & ~3) + k % 8 / 2;
      const float low = __shfl_sync(0xFFFFFFFFu, a[k / 8][k % 2], holder);
      const float high = __shfl_sync(0xFFFFFFFFu, a[k / 8][2 + k % 2], holder);
#pragma unroll
      for (int j = 0; j < B::kColumns / 8; ++j) {
        const auto two = *reinterpret_cast<const float2*>(b.row(k) + 8 * j + pair);
        sums[j][0] = fmaf(low, two.x, sums[j][0]);
        sums[j][1] = fmaf(low, two.y, sums[j][1]);
        sums[j][2] = fmaf(high, two.x, sums[j][2]);
        sums[j][3] = fmaf(high, two.y, sums[j][3]);
      }
    }
  } else {
    const int matrix = lane / 8;
    const int row = lane % 8;
#pragma unroll
    for (int k = 0; k < B::kRows; k += 16) {
      const auto& first = a[k / 8];
      const auto& second = a[k / 8 + 1];
      const std::uint32_t left[4] = {
          pack<Element>(first[0], first[1]), pack<Element>(first[2], first[3]),
          pack<Element>(second[0], second[1]), pack<Element>(second[2], second[3])};
#pragma unroll
      for (int j = 0; j < B::kColumns / 8; j += 2) {
        std::uint32_t right[4];
        load_matrices<true>(right, b.row(k + matrix % 2 * 8 + row) + 8 * j + matrix / 2 * 8);
        multiply_add_16<Element>(sums[j], left, right[0], right[1]);
        multiply_add_16<Element>(sums[j + 1], left, right[2], right[3]);
      }
    }
  }
}

/// Rows of B that are not finite leave a product in which some pairs are hidden: 0 * NaN must reach
/// nobody. Adds their part to `sums` where `sees(row of the lane, 0 or 8; row of B)` and zeroes
/// them. All threads of the block call it between barriers; `bad` has one byte per row of B.
template <typename B, typename Sees>
__device__ void add_bad_rows(float (&sums)[B::kColumns / 8][4], const float (&a)[B::kRows / 8][4],
                             B& b, unsigned char* bad, const Sees& sees) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int warps = static_cast<int>(blockDim.x) / 32;
  bool any = false;
  for (int k = warp; k < B::kRows; k += warps) {
    bool finite = true;
    for (int c = lane; c < B::kColumns; c += 32) {
      finite = finite && isfinite(float_of(b.row(k)[c]));
    }
    const bool is_bad = __any_sync(0xFFFFFFFFu, !finite) != 0;
    any = any || is_bad;
    if (lane == 0) {
      bad[k] = is_bad ? 1 : 0;
    }
  }
  if (__syncthreads_or(any ? 1 : 0) == 0) {
    return;
  }
  const int pair = 2 * (lane % 4);
  for (int k = 0; k < B::kRows; ++k) {
    if (bad[k] == 0) {
      continue;
    }
    float part[2] = {0.0f, 0.0f};  // of column k of A, which one lane of four holds
#pragma unroll
    for (int j = 0; j < B::kRows / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        if (8 * j + pair + e == k) {
          part[0] = a[j][e];
          part[1] = a[j][2 + e];
        }
      }
    }
    const int holder = (lane & ~3) + k % 8 / 2;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float weight = __shfl_sync(0xFFFFFFFFu, part[half], holder);
      if (sees(8 * half, k)) {
#pragma unroll
        for (int j = 0; j < B::kColumns / 8; ++j) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            sums[j][2 * half + e] += weight * float_of(b.row(k)[8 * j + pair + e]);
          }
        }
      }
    }
  }
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < B::kRows * B::kColumns;
       i += static_cast<int>(blockDim.x)) {
    if (bad[i / B::kColumns] != 0) {
      b.row(i / B::kColumns)[i % B::kColumns] = element_of<typename B::Element>(0.0f);
    }
  }
  __syncthreads();
}

/// Calls body(entry, row 0 or 8 of the lane's two, column) for every entry of an accumulator.
template <int kCount, typename Body>
__device__ inline void for_each_entry(float (&sums)[kCount][4], const Body& body) {
  const int pair = 2 * (static_cast<int>(threadIdx.x) % 4);
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      body(sums[j][e], e / 2, 8 * j + pair + e % 2);
    }
  }
}

/// The same for rare bodies that would take registers from the rest: entries pass through local
/// memory in a loop that is not unrolled.
template <int kCount, typename Body>
__device__ inline void for_each_entry_apart(float (&sums)[kCount][4], const Body& body) {
  float copy[kCount * 4];
  const int pair = 2 * (static_cast<int>(threadIdx.x) % 4);
#pragma unroll
  for (int j = 0; j < kCount * 4; ++j) {
    copy[j] = sums[j / 4][j % 4];
  }
#pragma unroll 1
  for (int j = 0; j < kCount * 4; ++j) {
    body(copy[j], j % 4 / 2, j / 4 * 8 + pair + j % 2);
  }
#pragma unroll
  for (int j = 0; j < kCount * 4; ++j) {
    sums[j / 4][j % 4] = copy[j];
  }
}

/// a - b, as far as rows of one tile can tell.
__device__ inline int distance(std::int64_t a, std::int64_t b) {
  constexpr std::int64_t kFar = 1 << 20;
  return static_cast<int>(max(-kFar, min(a - b, kFar)));
}

/// 2^x; below the smallest normal number 0.
__device__ inline float power_of_2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ inline float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, 2));
}
__device__ inline float quad_sum(float x) {
  x += __shfl_xor_sync(0xFFFFFFFFu, x, 1);
  return x + __shfl_xor_sync(0xFFFFFFFFu, x, 2);
}

}  // namespace dilated::gpu
