// E4 and E5: what does the sum over key tiles of dQ cost? The skeleton of a backward pass: a block
// owns one key tile of a (segment, head) of 2048 rows, visits its query tiles, spends the matrix
// products of a backward step on each (five of 128 x 128 x D, on random data), and adds a float32
// tile of 128 x D to dQ in global memory:
//   none       no sum (matrix products alone)
//   boxes      bulk tensor adds through the strided map into the natural layout
//   line       one 1-D bulk add into a packed buffer, then a pass that converts and permutes
//   ordered    as boxes, but tile by tile in ticket order; blocks start at different query tiles
//   ordered-line   the same with 1-D adds
// `products` 0 leaves the products out: the rate of the adds alone (E4).
#include <string>

#include "benchmarks/cuda/measure.cuh"
#include "src/kernels/cuda/device/ptx.cuh"
#include "src/kernels/cuda/device/wgmma.cuh"
#include "src/kernels/cuda/tensor_map.cuh"

namespace {

using namespace dilated;
constexpr int kTile = 128;
constexpr int kRows = 2048;
constexpr int kTiles = kRows / kTile;
constexpr int kConsumers = 256;

enum class Sum { kNone, kBoxes, kLine };

struct Arguments {
  gpu::DilatedMaps sums;
  float* packed;
  int* tickets;
  int dilation, heads, segments;
  int products;
  bool ordered;
  Sum sum;
  float* sink;
};

template <int kHeadDim>
struct alignas(1024) Shared {
  __nv_bfloat16 a[kTile * 128];
  __nv_bfloat16 b[kTile * 128];
  float sums[kTile * kHeadDim];
  gpu::Barrier full, empty;
};

template <int kHeadDim>
__device__ void add_tiles(const Arguments& arguments, Shared<kHeadDim>& shared) {
  int parity = 0;
  const int per_step = static_cast<int>(gridDim.x) / kTiles;
  const int key_tile = static_cast<int>(blockIdx.x) % kTiles;
  for (int group = static_cast<int>(blockIdx.x) / kTiles;
       group < arguments.segments * arguments.heads; group += per_step) {
    const int head = group % arguments.heads;
    const int segment = group / arguments.heads;
    const int residue = head % arguments.dilation;
    for (int step = 0; step < kTiles; ++step) {
      const int m = (key_tile + step) % kTiles;
      shared.full.wait(parity);
      parity ^= 1;
      int* ticket = arguments.tickets + group * kTiles + m;
      if (arguments.ordered) {
        int served = 0;
        do {
          asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(served) : "l"(ticket));
        } while (served != step);
        gpu::ptx::fence_proxy_async(gpu::ptx::space_global);
      }
      if (arguments.sum == Sum::kBoxes) {
        const CUtensorMap& map = arguments.sums.at(residue);
        for (int panel = 0; panel < kHeadDim / 32; ++panel) {
          const std::int32_t coordinates[5] = {32 * panel, segment * kRows + m * kTile, residue,
                                               head, 0};
          gpu::ptx::cp_reduce_async_bulk_tensor(gpu::ptx::space_global, gpu::ptx::space_shared,
                                                gpu::ptx::op_add, &map, coordinates,
                                                shared.sums + panel * kTile * 32);
        }
      } else {
        float* target = arguments.packed + (std::int64_t{group} * kRows + m * kTile) * kHeadDim;
        gpu::ptx::cp_reduce_async_bulk(gpu::ptx::space_global, gpu::ptx::space_shared,
                                       gpu::ptx::op_add, target, shared.sums, kTile * kHeadDim * 4);
      }
      gpu::ptx::cp_async_bulk_commit_group();
      if (arguments.ordered) {
        // Without .read: the sums have landed before the ticket goes on.
        gpu::ptx::cp_async_bulk_wait_group(gpu::ptx::n32_t<0>());
        gpu::ptx::fence_proxy_async(gpu::ptx::space_global);
        asm volatile("st.release.gpu.global.b32 [%0], %1;" ::"l"(ticket), "r"(step + 1) : "memory");
      } else {
        gpu::ptx::cp_async_bulk_wait_group_read(gpu::ptx::n32_t<0>());
      }
      shared.empty.arrive();
    }
  }
  gpu::ptx::cp_async_bulk_wait_group(gpu::ptx::n32_t<0>());
}

template <int kHeadDim>
__device__ void multiply(const Arguments& arguments, Shared<kHeadDim>& shared) {
  float acc[64] = {};
  int parity = 1;
  const int thread = static_cast<int>(threadIdx.x) - 128;
  const int warpgroup = thread / 128;
  const int per_step = static_cast<int>(gridDim.x) / kTiles;
  for (int group = static_cast<int>(blockIdx.x) / kTiles;
       group < arguments.segments * arguments.heads; group += per_step) {
    for (int step = 0; step < kTiles; ++step) {
      gpu::begin_products();
      gpu::pin(acc);
      for (int product = 0; product < arguments.products; ++product) {
#pragma unroll
        for (int k = 0; k < kHeadDim / 16; ++k) {
          const int panel = k / 4;
          gpu::Product<__nv_bfloat16, 128, false>::run(
              acc,
              gpu::advance(gpu::operand_of(shared.a + panel * kTile * 64 + warpgroup * 64 * 64),
                           k % 4 * 32),
              gpu::advance(gpu::operand_of(shared.b + panel * kTile * 64), k % 4 * 32),
              product + k > 0);
        }
      }
      gpu::pin(acc);
      gpu::commit_products();
      gpu::wait_products<0>();
      gpu::pin(acc);
      if (arguments.sum == Sum::kNone) {
        continue;
      }
      shared.empty.wait(parity);
      parity ^= 1;
      // Each thread writes the half row that it is handed here: whole 16 bytes, no bank twice.
      const int row = thread % 128;
      float4* target = reinterpret_cast<float4*>(shared.sums);
#pragma unroll
      for (int i = 0; i < kHeadDim / 8; ++i) {
        const int column = warpgroup * kHeadDim / 8 + i;  // of 16 bytes
        target[column / 8 * kTile * 8 + row * 8 + ((column ^ row) & 7)] = {
            acc[4 * i % 64], acc[(4 * i + 1) % 64], acc[(4 * i + 2) % 64], acc[(4 * i + 3) % 64]};
      }
      gpu::fence_async_proxy();
      shared.full.arrive();
    }
  }
  float total = 0;
  for (const float x : acc) {
    total += x;
  }
  arguments.sink[blockIdx.x * kConsumers + thread] = total;
}

template <int kHeadDim>
__global__ void __launch_bounds__(384, 1) skeleton(const __grid_constant__ Arguments arguments) {
  extern __shared__ __align__(1024) unsigned char memory[];
  auto& shared = *reinterpret_cast<Shared<kHeadDim>*>(memory);
  for (int i = static_cast<int>(threadIdx.x); i < kTile * 128; i += 384) {
    shared.a[i] = bench::value_at(3, i, 0.1f);
    shared.b[i] = bench::value_at(4, i, 0.1f);
  }
  if (threadIdx.x == 0) {
    shared.full.init(kConsumers);
    shared.empty.init(1);
    gpu::fence_barrier_init();
  }
  gpu::fence_async_proxy();
  __syncthreads();
  if (threadIdx.x < 128) {
    gpu::give_registers<40>();
    if (threadIdx.x == 0 && arguments.sum != Sum::kNone) {
      add_tiles<kHeadDim>(arguments, shared);
    }
  } else {
    gpu::take_registers<232>();
    multiply<kHeadDim>(arguments, shared);
  }
}

/// packed (segment, head, row, D) float32 -> natural bfloat16 rows of the head's residue.
template <int kHeadDim>
__global__ void permute(const float* packed, __nv_bfloat16* natural, int heads, int dilation) {
  constexpr int kPieces = kHeadDim / 4;
  const std::int64_t piece = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  const std::int64_t line = piece / kPieces;
  const int row = static_cast<int>(line % kRows);
  const int group = static_cast<int>(line / kRows);
  const int head = group % heads;
  const std::int64_t token =
      (std::int64_t{group / heads} * kRows + row) * dilation + head % dilation;
  const float4 x = reinterpret_cast<const float4*>(packed)[piece];
  __nv_bfloat162 y[2] = {__floats2bfloat162_rn(x.x, x.y), __floats2bfloat162_rn(x.z, x.w)};
  *reinterpret_cast<uint2*>(natural + (token * heads + head) * kHeadDim + piece % kPieces * 4) =
      reinterpret_cast<const uint2&>(y);
}

template <int kHeadDim>
void measure(int dilation) {
  constexpr std::int64_t kLength = 131072;
  const int heads = 2048 / kHeadDim;
  const std::int64_t row = std::int64_t{heads} * kHeadDim;
  bench::Buffer<float> natural(kLength * row);
  bench::Buffer<__nv_bfloat16> converted(kLength * row);
  bench::Buffer<float> packed(kLength * row / dilation);
  bench::Buffer<float> sink(132 * kConsumers);
  Arguments arguments{};
  arguments.dilation = dilation;
  arguments.heads = heads;
  arguments.segments = static_cast<int>(kLength / dilation / kRows);
  const int groups = heads * arguments.segments;
  bench::Buffer<int> tickets(std::int64_t{groups} * kTiles);
  arguments.sums = gpu::dilated_maps(
      {natural.data(), 1, kLength, heads, kHeadDim, kLength * row * 4, row * 4, kHeadDim * 4,
       CU_TENSOR_MAP_DATA_TYPE_FLOAT32, 4},
      dilation, {.box_rows = kTile, .box_columns = 32, .swizzle = CU_TENSOR_MAP_SWIZZLE_128B});
  arguments.packed = packed.data();
  arguments.tickets = tickets.data();
  arguments.sink = sink.data();
  constexpr int kShared = sizeof(Shared<kHeadDim>);
  bench::check(cudaFuncSetAttribute(skeleton<kHeadDim>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    kShared));
  const double bytes = double(groups) * kTiles * kTiles * kTile * kHeadDim * 4;
  struct Case {
    const char* name;
    Sum sum;
    bool ordered;
  };
  for (const int products : {0, 5}) {
    for (const Case& c : {Case{"none", Sum::kNone, false}, Case{"boxes", Sum::kBoxes, false},
                          Case{"line", Sum::kLine, false}, Case{"ordered", Sum::kBoxes, true},
                          Case{"ordered-line", Sum::kLine, true}}) {
      if (products == 0 && c.sum == Sum::kNone) {
        continue;
      }
      arguments.products = products;
      arguments.sum = c.sum;
      arguments.ordered = c.ordered;
      natural.clear();
      packed.clear();
      const double clear_ms = bench::median_ms([&] { tickets.clear(); }, 5);
      const double ms = bench::median_ms(
                            [&] {
                              tickets.clear();
                              skeleton<kHeadDim><<<128, 384, kShared>>>(arguments);
                            },
                            7) -
                        clear_ms;
      bench::check(cudaGetLastError());
      const double flop = 2.0 * products * groups * kTiles * kTiles * kTile * kTile * kHeadDim;
      std::printf("D %3d r %2d products %d %-13s %7.3f ms %6.0f TFLOP/s %6.0f GB/s added\n",
                  kHeadDim, dilation, products, c.name, ms, flop / ms * 1e-9,
                  c.sum == Sum::kNone ? 0.0 : bytes / ms * 1e-6);
    }
  }
  const double ms = bench::median_ms([&] {
    permute<kHeadDim><<<static_cast<unsigned>(packed.size() / 4 / 256), 256>>>(
        packed.data(), converted.data(), heads, dilation);
  });
  bench::check(cudaGetLastError());
  std::printf("D %3d r %2d convert and permute    %7.3f ms %6.0f GB/s read and written\n", kHeadDim,
              dilation, ms, double(packed.size()) * 6 / ms * 1e-6);
}

}  // namespace

int main() {
  for (const int dilation : {1, 4, 16}) {
    measure<128>(dilation);
    measure<64>(dilation);
  }
}
