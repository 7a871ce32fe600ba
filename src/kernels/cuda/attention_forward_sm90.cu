// Launches of the forward kernel: sparse branches first, then the dense branch that merges them.
#include <algorithm>
#include <cmath>
#include <memory>
#include <stdexcept>
#include <string>

#include "src/kernels/cuda/attention_forward_sm90.cuh"
#include "src/kernels/cuda/attention_forward_sm90.h"

namespace dilated::gpu {
namespace {

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
  }
}

RowTensor rows_of(const ForwardCall& call, const ForwardCall::View& view, std::int64_t heads) {
  constexpr std::int64_t kBytes = 2;
  return {view.data,
          call.batch,
          call.length,
          heads,
          call.head_dim,
          view.batch_stride * kBytes,
          view.row_stride * kBytes,
          view.head_stride * kBytes,
          call.dtype == DType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                         : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
          kBytes};
}

BranchGeometry geometry_of(const ForwardCall& call, const Branch& branch) {
  return {call.length, branch.segment, branch.dilation};
}

template <typename Element, int kHeadDim, bool kCausal, bool kMerges>
void launch(const ForwardCall& call, ForwardArguments& arguments,
            std::span<const std::size_t> branches) {
  using Tiles = ForwardTiles<kHeadDim>;
  const MapOptions query_box = {.box_rows = Tiles::kRows};
  const MapOptions key_box = {.box_rows = Tiles::kKeys};
  std::int64_t tiles = 0;
  arguments.num_branches = static_cast<int>(branches.size());
  for (std::size_t i = 0; i < branches.size(); ++i) {
    const Branch& branch = call.branches[branches[i]];
    const BranchGeometry geometry = geometry_of(call, branch);
    BranchTiles& target = arguments.branches[i];
    target.query = dilated_maps(rows_of(call, call.query, call.heads), branch.dilation, query_box);
    target.key = dilated_maps(rows_of(call, call.key, call.kv_heads), branch.dilation, key_box);
    target.value = dilated_maps(rows_of(call, call.value, call.kv_heads), branch.dilation, key_box);
    target.rows = {static_cast<int>(geometry.segment), static_cast<int>(geometry.dilation),
                   static_cast<int>(geometry.slots()),
                   kMerges ? 0 : arguments.partials[i].row_begin};
    target.segments = static_cast<int>(geometry.num_segments());
    target.tiles = static_cast<int>(ceil_div(geometry.slots(), Tiles::kRows));
    target.first_tile = static_cast<int>(tiles);
    tiles += std::int64_t{target.segments} * target.tiles * call.heads * call.batch;
    std::copy(branch.offsets.begin(), branch.offsets.end(),
              arguments.offsets + i * static_cast<std::size_t>(call.heads));
  }
  arguments.num_tiles = static_cast<int>(tiles);
  if (tiles == 0) {
    return;
  }
  const auto kernel = forward_kernel<Element, kHeadDim, kCausal, kMerges, 0>;
  constexpr int kShared = sizeof(ForwardShared<Element, kHeadDim>);
  static const int units = [&] {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared),
          "forward: shared memory");
    int device = 0;
    int count = 0;
    check(cudaGetDevice(&device), "cudaGetDevice");
    check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device),
          "multiprocessors");
    return count;
  }();
  const auto grid = static_cast<unsigned>(std::min<std::int64_t>(tiles, units));
  kernel<<<grid, Tiles::kThreads, kShared, call.stream>>>(arguments);
  check(cudaGetLastError(), "forward: launch");
}

template <typename Element, int kHeadDim, bool kCausal>
void run(const ForwardCall& call) {
  const std::size_t dense = dense_branch(call.branches);
  std::vector<std::size_t> sparse;
  for (std::size_t b = 0; b < call.branches.size(); ++b) {
    if (b != dense) {
      sparse.push_back(b);
    }
  }
  std::stable_sort(sparse.begin(), sparse.end(), [&](std::size_t a, std::size_t b) {
    return call.branches[a].segment < call.branches[b].segment;
  });

  const auto arguments = std::make_unique<ForwardArguments>();
  arguments->num_partials = static_cast<int>(sparse.size());
  std::int64_t rows = 0;
  for (std::size_t i = 0; i < sparse.size(); ++i) {
    const Branch& branch = call.branches[sparse[i]];
    const BranchGeometry geometry = geometry_of(call, branch);
    arguments->partials[i] = {static_cast<int>(geometry.segment),
                              static_cast<int>(geometry.dilation),
                              static_cast<int>(geometry.slots()), static_cast<int>(rows)};
    rows += geometry.compact_rows({0, call.length});
    std::copy(branch.offsets.begin(), branch.offsets.end(),
              arguments->partial_offsets + i * static_cast<std::size_t>(call.heads));
  }
  arguments->partial_rows = rows;
  arguments->partial_out = call.partial_out;
  arguments->partial_sums = reinterpret_cast<float2*>(call.partial_sums);
  arguments->length = static_cast<int>(call.length);
  arguments->heads = static_cast<int>(call.heads);
  arguments->heads_per_kv_head = static_cast<int>(call.heads / call.kv_heads);
  const float factor = std::abs(call.scale) * 1.4426950408889634f;
  arguments->factor = factor > 0.0f ? factor : 1.0f;
  arguments->sign = factor > 0.0f ? (call.scale < 0.0f ? -1.0f : 1.0f) : 0.0f;
  arguments->out = call.out.data;
  arguments->out_batch_stride = call.out.batch_stride;
  arguments->out_row_stride = call.out.row_stride;
  arguments->out_head_stride = call.out.head_stride;
  arguments->lse = call.lse;

  check(cudaMemsetAsync(call.tickets, 0, 2 * sizeof(int), call.stream), "forward: tickets");
  arguments->ticket = call.tickets;
  launch<Element, kHeadDim, kCausal, false>(call, *arguments, sparse);
  arguments->ticket = call.tickets + 1;
  launch<Element, kHeadDim, kCausal, true>(call, *arguments, {&dense, 1});
}

template <typename Element>
void run_dtype(const ForwardCall& call) {
  if (call.head_dim == 64) {
    call.is_causal ? run<Element, 64, true>(call) : run<Element, 64, false>(call);
  } else if (call.head_dim == 128) {
    call.is_causal ? run<Element, 128, true>(call) : run<Element, 128, false>(call);
  } else {
    throw std::invalid_argument("forward_sm90: head_dim: expected 64 or 128");
  }
}

}  // namespace

std::size_t dense_branch(std::span<const Branch> branches) {
  for (std::size_t b = 0; b < branches.size(); ++b) {
    const auto& offsets = branches[b].offsets;
    if (branches[b].dilation == 1 &&
        std::all_of(offsets.begin(), offsets.end(), [](std::int64_t o) { return o == 0; })) {
      return b;
    }
  }
  throw std::invalid_argument("forward_sm90: branches: expected one with dilation 1");
}

std::int64_t partial_rows(std::int64_t length, std::span<const Branch> branches) {
  const std::size_t dense = dense_branch(branches);
  std::int64_t rows = 0;
  for (std::size_t b = 0; b < branches.size(); ++b) {
    if (b != dense) {
      rows += BranchGeometry(length, branches[b].segment, branches[b].dilation)
                  .compact_rows({0, length});
    }
  }
  return rows;
}

void forward_sm90(const ForwardCall& call) {
  if (call.branches.size() > kMaxBranches ||
      static_cast<std::int64_t>(call.branches.size()) * call.heads > kMaxOffsets) {
    throw std::invalid_argument("forward_sm90: branches: too many");
  }
  call.dtype == DType::kBFloat16 ? run_dtype<__nv_bfloat16>(call) : run_dtype<__half>(call);
}

}  // namespace dilated::gpu
