// E1: do strided rows cost bandwidth? Every head reads its residue of a (1, S, 32, D) bfloat16
// tensor in boxes of 128 rows, six boxes in flight per multiprocessor, through the sequence view
// (src/kernels/cuda/tensor_map.cuh) and through a segment view of the same rows.
#include <utility>

#include "benchmarks/cuda/measure.cuh"
#include "src/kernels/cuda/device/ptx.cuh"
#include "src/kernels/cuda/tensor_map.cuh"

namespace {

using namespace dilated;
constexpr int kRows = 128;
constexpr int kHeads = 32;
constexpr int kStages = 6;
constexpr int kSegmentRows = 2048;  // of one residue

struct Arguments {
  gpu::DilatedMaps sequence;
  CUtensorMap segment_view;
  int dilation, segments;
  bool by_segment;
  unsigned* sink;
};

template <int kHeadDim>
__global__ void __launch_bounds__(32) stream(const __grid_constant__ Arguments arguments) {
  constexpr int kPanels = kHeadDim / 64;
  constexpr int kBox = kRows * 64 * 2;
  extern __shared__ __align__(1024) unsigned char memory[];
  __shared__ gpu::Barrier full[kStages];
  if (threadIdx.x != 0) {
    return;
  }
  for (auto& barrier : full) {
    barrier.init(1);
  }
  gpu::fence_barrier_init();
  constexpr int kTiles = kSegmentRows / kRows;
  const int boxes = arguments.segments * kHeads * kTiles;
  const int step = static_cast<int>(gridDim.x);
  unsigned sum = 0;
  int issued = 0;
  int used = 0;
  int next = static_cast<int>(blockIdx.x);
  const auto issue = [&] {
    const int stage = issued++ % kStages;
    const int tile = next % kTiles;
    const int head = next / kTiles % kHeads;
    const int segment = next / kTiles / kHeads;
    next += step;
    const int residue = head % arguments.dilation;
    full[stage].arrive_and_expect(kPanels * kBox);
    for (int panel = 0; panel < kPanels; ++panel) {
      void* target = memory + (stage * kPanels + panel) * kBox;
      if (arguments.by_segment) {
        gpu::load_box(target, arguments.segment_view, 64 * panel, tile * kRows, residue, head,
                      segment, full[stage]);
      } else {
        gpu::load_box(target, arguments.sequence.at(residue), 64 * panel,
                      segment * kSegmentRows + tile * kRows, residue, head, 0, full[stage]);
      }
    }
  };
  while (issued < kStages && next < boxes) {
    issue();
  }
  while (used < issued) {
    const int stage = used % kStages;
    full[stage].wait(used / kStages % 2);
    sum += *reinterpret_cast<const unsigned*>(memory + stage * kPanels * kBox);
    ++used;
    if (next < boxes) {
      issue();
    }
  }
  arguments.sink[blockIdx.x] = sum;
}

template <int kHeadDim>
void measure(std::int64_t length) {
  bench::Buffer<__nv_bfloat16> tensor(length * kHeads * kHeadDim);
  bench::fill(tensor, 1, 1.0f);
  bench::Buffer<unsigned> sink(1024);
  std::printf("D %d, GB/s: r, sequence view 256 B, 128 B, segment view 256 B, 128 B promotion\n",
              kHeadDim);
  for (const int dilation : {1, 2, 4, 6, 8, 12, 16}) {
    const std::int64_t segment = std::int64_t{kSegmentRows} * dilation;
    const std::int64_t row = std::int64_t{kHeads} * kHeadDim * 2;
    const gpu::RowTensor rows = {tensor.data(),
                                 1,
                                 length,
                                 kHeads,
                                 kHeadDim,
                                 length * row,
                                 row,
                                 kHeadDim * 2,
                                 CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                                 2};
    Arguments arguments{};
    arguments.dilation = dilation;
    arguments.segments = static_cast<int>(length / segment);
    arguments.sink = sink.data();
    const double bytes = double(arguments.segments) * kSegmentRows * row;
    std::printf("%3d", dilation);
    for (const bool by_segment : {false, true}) {
      for (const auto promotion :
           {CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B}) {
        const gpu::MapOptions options = {.promotion = promotion};
        const auto size = [](std::int64_t n) { return static_cast<cuuint64_t>(n); };
        arguments.by_segment = by_segment;
        arguments.sequence = gpu::dilated_maps(rows, dilation, options);
        arguments.segment_view = gpu::encode_map(
            tensor.data(), CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            {size(kHeadDim), size(kSegmentRows), size(dilation), size(kHeads),
             size(arguments.segments)},
            {size(dilation * row), size(row), size(kHeadDim * 2), size(segment * row)}, options);
        constexpr int kShared = kStages * kRows * kHeadDim * 2;
        bench::check(cudaFuncSetAttribute(stream<kHeadDim>,
                                          cudaFuncAttributeMaxDynamicSharedMemorySize, kShared));
        const int blocks = bench::multiprocessors();
        const double ms =
            bench::median_ms([&] { stream<kHeadDim><<<blocks, 32, kShared>>>(arguments); });
        bench::check(cudaGetLastError());
        std::printf(" %7.0f", bytes / ms * 1e-6);
      }
    }
    std::printf("\n");
  }
}

}  // namespace

int main() {
  measure<64>(524288);
  measure<128>(262144);
}
