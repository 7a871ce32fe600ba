// Sends the tables of a plan to the device.
#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "src/kernels/cuda/call.h"
#include "src/kernels/cuda/device/launch.cuh"

namespace dilated::gpu {
namespace {

template <int kWords>
struct Chunk {
  std::uint64_t words[kWords];
};

template <int kWords>
__global__ void write_words(const __grid_constant__ Chunk<kWords> chunk, std::uint64_t* to,
                            int count) {
  for (int i = static_cast<int>(threadIdx.x); i < count; i += static_cast<int>(blockDim.x)) {
    to[i] = chunk.words[i];
  }
}

/// One launch: `count` bytes, at most the chunk's.
template <int kWords>
void send(const std::byte* from, std::byte* to, std::size_t bytes, cudaStream_t stream) {
  Chunk<kWords> chunk;
  std::memcpy(chunk.words, from, bytes);
  write_words<kWords><<<1, 256, 0, stream>>>(chunk, reinterpret_cast<std::uint64_t*>(to),
                                             static_cast<int>(bytes / sizeof(std::uint64_t)));
  check(cudaGetLastError(), "tables");
}

constexpr std::size_t kSmall = 4000;
constexpr std::size_t kLarge = 32000;
static_assert(sizeof(Sequence) % 8 == 0 && sizeof(TileGroup) % 8 == 0 &&
              sizeof(BranchShape) % 8 == 0 && std::is_trivially_copyable_v<Sequence>);

}  // namespace

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    throw std::runtime_error("dilated: CUDA: " + std::string(what) + ": " +
                             cudaGetErrorString(error));
  }
}

DeviceGuard::DeviceGuard(std::int64_t index) : current_(static_cast<int>(index)) {
  check(cudaGetDevice(&previous_), "current device");
  if (previous_ != current_) {
    check(cudaSetDevice(current_), "device");
  }
}

DeviceGuard::~DeviceGuard() {
  if (previous_ != current_) {
    cudaSetDevice(previous_);
  }
}

Call begin_call(const Plan& plan, const Masks& masks, const Context& context) {
  const Problem& problem = plan.problem();
  const auto& decision = static_cast<const CudaDecision&>(plan.decision());
  std::byte* const base = context.workspace.data();
  const std::vector<std::byte>& tables = decision.tables;
  for (std::size_t done = 0; done < tables.size();) {
    const std::size_t left = tables.size() - done;
    const std::size_t bytes = std::min(left, left <= kSmall ? kSmall : kLarge);
    (bytes <= kSmall ? send<kSmall / 8> : send<kLarge / 8>)(tables.data() + done, base + done,
                                                            bytes, stream_of(context));
    done += bytes;
  }
  const std::int64_t row_bytes = problem.head_dim * size_of(problem.dtype);
  return {.sequences = reinterpret_cast<const Sequence*>(base + decision.at.sequences),
          .branches = reinterpret_cast<const BranchShape*>(base + decision.at.branches),
          .offsets = reinterpret_cast<const std::int64_t*>(base + decision.at.offsets),
          .query_groups = reinterpret_cast<const TileGroup*>(base + decision.at.query_groups),
          .forward_groups = reinterpret_cast<const TileGroup*>(base + decision.at.forward_groups),
          .key_groups = reinterpret_cast<const TileGroup*>(base + decision.at.key_groups),
          .backward_query_groups =
              reinterpret_cast<const TileGroup*>(base + decision.at.backward_query_groups),
          .backward_key_groups =
              reinterpret_cast<const TileGroup*>(base + decision.at.backward_key_groups),
          .row_groups = reinterpret_cast<const TileGroup*>(base + decision.at.row_groups),
          .num_sequences = static_cast<int>(plan.sequences().size()),
          .num_branches = static_cast<int>(problem.branches.size()),
          .num_heads = static_cast<int>(problem.num_heads),
          .heads_per_kv_head = static_cast<int>(problem.heads_per_kv_head()),
          .head_dim = static_cast<int>(problem.head_dim),
          .branch_rows = plan.branch_rows(),
          .head_offset = problem.head_offset,
          .all_heads = problem.all_heads(),
          .dropout_p = problem.dropout_p,
          .units = ScoreUnits(plan.scale()),
          .scale = static_cast<float>(plan.scale()),
          .out_scale = static_cast<float>(problem.out_scale),
          .merge = problem.merge,
          .is_causal = problem.is_causal,
          .has_phantoms = problem.tail == Tail::kPhantom && !problem.is_causal,
          .needs_branch_outputs = plan.needs_branch_outputs(),
          .copies_16_bytes = problem.alignment >= 16 && row_bytes % 16 == 0,
          .masks = masks};
}

}  // namespace dilated::gpu
