// E2: what does the copy engine touch at the end of an allocation? A tensor ends where mapped
// memory ends; each case runs in its own process, since a fault ends the context:
//   tight     the sequence view's two maps, boxes that reach beyond their extents
//   rounded   extents rounded up: rows beyond the allocation are in bounds
//   rounded-unused  the same map, boxes that stay inside the allocation
//   shifted   base before the allocation, boxes that stay inside it: load, and shifted-store
#include <string>
#include <string_view>

#include "benchmarks/cuda/measure.cuh"
#include "src/kernels/cuda/device/ptx.cuh"
#include "src/kernels/cuda/tensor_map.cuh"

namespace {

using namespace dilated;
constexpr int kColumns = 64;
constexpr int kBoxRows = 128;
constexpr std::int64_t kRowBytes = kColumns * 2;

__global__ void load(const __grid_constant__ CUtensorMap map, int row, int residue, bool store,
                     unsigned short* out) {
  __shared__ __align__(1024) unsigned short box[kBoxRows * kColumns];
  __shared__ gpu::Barrier full;
  if (threadIdx.x == 0) {
    full.init(1);
    gpu::fence_barrier_init();
    full.arrive_and_expect(sizeof(box));
    gpu::load_box(box, map, 0, row, residue, 0, 0, full);
  }
  __syncthreads();
  full.wait(0);
  if (store && threadIdx.x == 0) {
    const std::int32_t coordinates[5] = {0, row, residue, 0, 0};
    gpu::ptx::cp_async_bulk_tensor(gpu::ptx::space_global, gpu::ptx::space_shared, &map,
                                   coordinates, box);
    gpu::ptx::cp_async_bulk_commit_group();
    gpu::ptx::cp_async_bulk_wait_group(gpu::ptx::n32_t<0>());
  }
  for (int i = threadIdx.x; i < kBoxRows * kColumns; i += blockDim.x) {
    out[i] = box[i];
  }
}

/// `bytes` of mapped memory with unmapped neighbours on both sides.
unsigned char* guarded(std::size_t bytes) {
  CUmemAllocationProp properties{};
  properties.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  properties.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
  properties.location.id = 0;
  const auto entry = [](const char* name) {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found{};
    bench::check(
        cudaGetDriverEntryPointByVersion(name, &function, 12000, cudaEnableDefault, &found));
    return function;
  };
  bench::check(cudaFree(nullptr));
  CUmemGenericAllocationHandle handle{};
  CUdeviceptr address{};
  const auto require = [](CUresult result) {
    if (result != CUDA_SUCCESS) {
      std::printf("driver error %d\n", result);
      std::exit(2);
    }
  };
  require(reinterpret_cast<decltype(&cuMemAddressReserve)>(entry("cuMemAddressReserve"))(
      &address, 64 * bytes, bytes, 0, 0));
  require(reinterpret_cast<decltype(&cuMemCreate)>(entry("cuMemCreate"))(&handle, bytes,
                                                                         &properties, 0));
  const CUdeviceptr inside = address + 32 * bytes;
  require(reinterpret_cast<decltype(&cuMemMap)>(entry("cuMemMap"))(inside, bytes, 0, handle, 0));
  CUmemAccessDesc access{};
  access.location = properties.location;
  access.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
  require(reinterpret_cast<decltype(&cuMemSetAccess)>(entry("cuMemSetAccess"))(inside, bytes,
                                                                               &access, 1));
  return reinterpret_cast<unsigned char*>(inside);
}

int run(std::string_view what) {
  constexpr std::size_t kBytes = 2 << 20;
  unsigned char* memory = guarded(kBytes);
  bench::check(cudaMemset(memory, 0x3F, kBytes));
  constexpr std::int64_t kLength = 1003;
  constexpr std::int64_t kDilation = 4;  // residues 0 to 2 have 251 rows, residue 3 has 250
  unsigned char* tensor = memory + kBytes - kLength * kRowBytes;
  bench::Buffer<unsigned short> box(kBoxRows * kColumns);
  const auto count = [&](const CUtensorMap& map, int row, int residue, bool store = false) {
    load<<<1, 128>>>(map, row, residue, store, box.data());
    bench::check(cudaDeviceSynchronize());
    int rows = 0;
    for (const unsigned short x : box.host()) {
      rows += x == 0x3F3F;
    }
    return rows / kColumns;
  };
  const gpu::MapOptions options{};
  const gpu::RowTensor rows = {tensor,    1,         kLength,
                               1,         kColumns,  kLength * kRowBytes,
                               kRowBytes, kRowBytes, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                               2};
  const auto map = [&](unsigned char* base, cuuint64_t extent, cuuint64_t residues) {
    return gpu::encode_map(
        base, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, {kColumns, extent, residues, 1, 1},
        {kDilation * kRowBytes, kRowBytes, kRowBytes, kLength * kRowBytes}, options);
  };
  if (what == "tight") {
    const gpu::DilatedMaps maps = gpu::dilated_maps(rows, kDilation, options);
    for (int residue = 0; residue < kDilation; ++residue) {
      const CUtensorMap& one = residue < maps.longer_residues ? maps.longer : maps.shorter;
      const int expected = residue < 3 ? 11 : 10;
      const int got = count(one, 240, residue);
      std::printf("tight: residue %d: %d rows, expected %d\n", residue, got, expected);
      if (got != expected) {
        return 1;
      }
    }
  } else if (what == "rounded") {
    std::printf("rounded: %d rows\n", count(map(tensor, 252, kDilation), 200, 3));
  } else if (what == "rounded-unused") {
    std::printf("rounded-unused: %d rows\n", count(map(tensor, 252, kDilation), 100, 3));
  } else if (what == "shifted" || what == "shifted-store") {
    // Base 100000 rows of residue 0 before the tensor, which is unmapped memory.
    unsigned char* base = tensor - 100000 * kRowBytes;
    std::printf("%s: %d rows\n", std::string(what).c_str(),
                count(map(base, 25250, 1), 25100, 0, what == "shifted-store"));
  } else {
    return 2;
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) { return argc == 2 ? run(argv[1]) : 2; }
