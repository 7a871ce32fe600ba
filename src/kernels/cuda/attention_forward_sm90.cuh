// Forward on Hopper (semantics §4). One tile of work is a block of query rows of one (branch,
// segment, head); its keys pass by in tiles of 128:
//   S = Q K^T,  P = 2^(factor S - reference),  O = shrink O + P V
// One warp loads by bulk tensor copies; each other warpgroup owns 64 query rows and overlaps the
// product S of a tile with the softmax of that before. Two launches: sparse branches write partial
// results; the dense branch merges them into its own rows and writes O and the log-sum-exp once.
#pragma once

#include <cstdint>

#include "src/kernels/cuda/device/ptx.cuh"
#include "src/kernels/cuda/device/softmax.cuh"
#include "src/kernels/cuda/device/wgmma.cuh"
#include "src/kernels/cuda/tensor_map.cuh"
#include "src/merge.h"

namespace dilated::gpu {

inline constexpr int kMaxBranches = 8;
inline constexpr int kMaxOffsets = 1024;  // branches x heads
inline constexpr int kPanelColumns = 64;  // 128 bytes, what one swizzled row of shared memory holds

/// Where rows of a branch lie in partial results.
struct BranchRows {
  int segment;
  int dilation;
  int slots;  // rows of a full segment
  int row_begin;
};

struct BranchTiles {
  DilatedMaps query, key, value;
  BranchRows rows;
  int segments;    // per sequence
  int tiles;       // per segment
  int first_tile;  // among all branches of the launch
};

struct ForwardArguments {
  BranchTiles branches[kMaxBranches];
  int offsets[kMaxOffsets];  // (branches of this launch, heads)
  BranchRows partials[kMaxBranches];
  int partial_offsets[kMaxOffsets];
  int num_branches, num_partials, num_tiles;
  int length, heads, heads_per_kv_head;
  float factor;  // |scale| log2(e)
  float sign;    // of scale
  std::int64_t partial_rows;
  float* partial_out;
  float2* partial_sums;  // reference and sum, base 2
  void* out;
  std::int64_t out_batch_stride, out_row_stride, out_head_stride;
  float* lse;
  int* ticket;
};

/// Query rows and stages per head_dim.
template <int kHeadDim>
struct ForwardTiles {
  static constexpr int kWarpgroups = kHeadDim <= 64 ? 3 : 2;
  static constexpr int kRows = 64 * kWarpgroups;
  static constexpr int kKeys = 128;
  static constexpr int kStages = 2;
  static constexpr int kPanels = kHeadDim / kPanelColumns;
  static constexpr int kThreads = 128 * (kWarpgroups + 1);
  static constexpr int kProducerRegisters = kWarpgroups == 3 ? 32 : 24;
  static constexpr int kConsumerRegisters = kWarpgroups == 3 ? 160 : 240;
};

template <typename Element, int kHeadDim>
struct alignas(1024) ForwardShared {
  using Tiles = ForwardTiles<kHeadDim>;
  Element query[Tiles::kPanels][Tiles::kRows * kPanelColumns];
  Element key[Tiles::kStages][Tiles::kPanels][Tiles::kKeys * kPanelColumns];
  Element value[Tiles::kStages][Tiles::kPanels][Tiles::kKeys * kPanelColumns];
  Barrier query_full, query_empty;
  Barrier key_full[Tiles::kStages], key_empty[Tiles::kStages];
  Barrier value_full[Tiles::kStages], value_empty[Tiles::kStages];
  Barrier tile_full[2], tile_empty[2];
  int tile[2];
};

/// Block of query rows of one (branch, batch, segment, head); rows are counted within the class.
struct QueryTile {
  int branch, batch, segment, head;
  int position;  // of row 0 of the class
  int first_row;
  int rows;  // of the class in this segment

  __device__ bool empty() const { return first_row >= rows; }
};

template <bool kCausal, int kRows>
__device__ inline QueryTile query_tile(const ForwardArguments& arguments, int index) {
  int branch = 0;
  while (branch + 1 < arguments.num_branches &&
         index >= arguments.branches[branch + 1].first_tile) {
    ++branch;
  }
  const BranchTiles& b = arguments.branches[branch];
  const auto u = static_cast<unsigned>(index - b.first_tile);
  const unsigned block = u % static_cast<unsigned>(b.tiles);
  const unsigned v = u / static_cast<unsigned>(b.tiles);
  QueryTile tile;
  tile.branch = branch;
  tile.head = static_cast<int>(v % static_cast<unsigned>(arguments.heads));
  const unsigned w = v / static_cast<unsigned>(arguments.heads);
  tile.segment = static_cast<int>(w % static_cast<unsigned>(b.segments));
  tile.batch = static_cast<int>(w / static_cast<unsigned>(b.segments));
  // Causal: longest first.
  tile.first_row =
      kRows * (kCausal ? b.tiles - 1 - static_cast<int>(block) : static_cast<int>(block));
  const int offset = arguments.offsets[branch * arguments.heads + tile.head];
  const int begin = tile.segment * b.rows.segment;
  const int length = min(b.rows.segment, arguments.length - begin);
  tile.position = begin + offset;
  tile.rows = offset >= 0 && length > offset ? (length - offset - 1) / b.rows.dilation + 1 : 0;
  return tile;
}

/// Key tiles that the rows of a block see.
template <bool kCausal, int kRows, int kKeys>
__device__ inline int key_tiles(const QueryTile& tile) {
  const int keys = kCausal ? min(tile.rows, tile.first_row + kRows) : tile.rows;
  return (keys + kKeys - 1) / kKeys;
}

/// Index and parity of a ring of `kStages` buffers.
template <int kStages>
struct Ring {
  int stage = 0;
  std::uint32_t parity = 0;

  __device__ void step() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

template <typename Element, int kHeadDim, bool kCausal>
__device__ inline void produce(const ForwardArguments& arguments,
                               ForwardShared<Element, kHeadDim>& shared) {
  using Tiles = ForwardTiles<kHeadDim>;
  constexpr std::uint32_t kQueryBytes = sizeof(shared.query);
  constexpr std::uint32_t kKeyBytes = sizeof(shared.key[0]);
  Ring<Tiles::kStages> keys, values;
  Ring<2> queue;
  Ring<1> queries;
  int next = static_cast<int>(blockIdx.x);
  for (;;) {
    const int index = next;
    shared.tile_empty[queue.stage].wait(queue.parity ^ 1);
    shared.tile[queue.stage] = index;
    shared.tile_full[queue.stage].arrive();
    queue.step();
    if (index >= arguments.num_tiles) {
      return;
    }
    next = static_cast<int>(gridDim.x) + atomicAdd(arguments.ticket, 1);
    const QueryTile tile = query_tile<kCausal, Tiles::kRows>(arguments, index);
    if (tile.empty()) {
      continue;
    }
    const BranchTiles& branch = arguments.branches[tile.branch];
    const int residue = tile.position % branch.rows.dilation;
    const int row = tile.position / branch.rows.dilation;
    const int kv_head = tile.head / arguments.heads_per_kv_head;
    const CUtensorMap& query_map = branch.query.at(residue);
    const CUtensorMap& key_map = branch.key.at(residue);
    const CUtensorMap& value_map = branch.value.at(residue);
    const auto load_key = [&](int n) {
      shared.key_empty[keys.stage].wait(keys.parity ^ 1);
      shared.key_full[keys.stage].arrive_and_expect(kKeyBytes);
#pragma unroll
      for (int panel = 0; panel < Tiles::kPanels; ++panel) {
        load_box(shared.key[keys.stage][panel], key_map, kPanelColumns * panel,
                 row + n * Tiles::kKeys, residue, kv_head, tile.batch, shared.key_full[keys.stage]);
      }
      keys.step();
    };
    const auto load_value = [&](int n) {
      shared.value_empty[values.stage].wait(values.parity ^ 1);
      shared.value_full[values.stage].arrive_and_expect(kKeyBytes);
#pragma unroll
      for (int panel = 0; panel < Tiles::kPanels; ++panel) {
        load_box(shared.value[values.stage][panel], value_map, kPanelColumns * panel,
                 row + n * Tiles::kKeys, residue, kv_head, tile.batch,
                 shared.value_full[values.stage]);
      }
      values.step();
    };

    const int count = key_tiles<kCausal, Tiles::kRows, Tiles::kKeys>(tile);
    load_key(count - 1);
    shared.query_empty.wait(queries.parity ^ 1);
    shared.query_full.arrive_and_expect(kQueryBytes);
#pragma unroll
    for (int panel = 0; panel < Tiles::kPanels; ++panel) {
      load_box(shared.query[panel], query_map, kPanelColumns * panel, row + tile.first_row, residue,
               tile.head, tile.batch, shared.query_full);
    }
    queries.step();
    for (int n = count - 2; n >= 0; --n) {
      load_key(n);
      load_value(n + 1);
    }
    load_value(0);
  }
}

/// One warpgroup of 64 query rows.
template <typename Element, int kHeadDim, bool kCausal, bool kMerges, int kPolynomial>
class Consumer {
  using Tiles = ForwardTiles<kHeadDim>;
  using Shared = ForwardShared<Element, kHeadDim>;
  static constexpr int kDepth = 16;
  static constexpr int kScores = Tiles::kKeys / 2;

 public:
  __device__ Consumer(const ForwardArguments& arguments, Shared& shared)
      : arguments_(arguments),
        shared_(shared),
        thread_(static_cast<int>(threadIdx.x) % 128),
        first_row_(static_cast<int>(threadIdx.x) / 128 * 64 - 64) {}

  __device__ void run() {
    Ring<2> queue;
    for (;;) {
      shared_.tile_full[queue.stage].wait(queue.parity);
      const int index = shared_.tile[queue.stage];
      arrive(shared_.tile_empty[queue.stage]);
      queue.step();
      if (index >= arguments_.num_tiles) {
        return;
      }
      tile_ = query_tile<kCausal, Tiles::kRows>(arguments_, index);
      if (!tile_.empty()) {
        attend();
        finish();
      }
    }
  }

 private:
  /// Of one warp, after all its threads have come here.
  __device__ void arrive(Barrier& barrier) {
    __syncwarp();
    if (thread_ % 32 == 0) {
      barrier.arrive();
    }
  }

  /// Row of the class that holds this thread's elements 4 j + 2 i.
  __device__ int row(int i) const {
    return tile_.first_row + first_row_ + thread_ / 32 * 16 + thread_ % 32 / 4 + 8 * i;
  }

  __device__ void score(float (&scores)[kScores]) {
    shared_.key_full[keys_.stage].wait(keys_.parity);
    begin_products();
    pin(scores);
#pragma unroll
    for (int k = 0; k < kHeadDim / kDepth; ++k) {
      const int panel = k * kDepth / kPanelColumns;
      const std::uint32_t bytes = k * kDepth % kPanelColumns * sizeof(Element);
      Product<Element, Tiles::kKeys, false>::run(
          scores, advance(operand_of(shared_.query[panel] + first_row_ * kPanelColumns), bytes),
          advance(operand_of(shared_.key[keys_.stage][panel]), bytes), k > 0);
    }
    pin(scores);
    commit_products();
  }

  __device__ void add_values(std::uint32_t (&probabilities)[kScores / 8][4], bool accumulate) {
    begin_products();
    pin(acc_);
    const std::uint64_t value =
        operand_of(shared_.value[values_.stage][0], sizeof(shared_.value[0][0]));
#pragma unroll
    for (int k = 0; k < Tiles::kKeys / kDepth; ++k) {
      Product<Element, kHeadDim, true>::run(acc_, probabilities[k],
                                            advance(value, k * kDepth * 128), accumulate || k > 0);
    }
    pin(acc_);
    commit_products();
  }

  /// Rows of the value tile beyond the segment are the next segment's: 0 * NaN must reach nobody.
  __device__ void clear_values(int n) {
    const int begin = tile_.rows - n * Tiles::kKeys;
    if (begin >= Tiles::kKeys) {
      return;
    }
    constexpr int kChunks = kPanelColumns * sizeof(Element) / 16;
    const int chunks = (Tiles::kKeys - begin) * kChunks;
    for (int panel = 0; panel < Tiles::kPanels; ++panel) {
      auto* rows = reinterpret_cast<uint4*>(shared_.value[values_.stage][panel]) + begin * kChunks;
      for (int i = first_row_ * 2 + thread_; i < chunks; i += 128 * Tiles::kWarpgroups) {
        rows[i] = uint4{0, 0, 0, 0};
      }
    }
    fence_async_proxy();
    named_barrier(1, 128 * Tiles::kWarpgroups);
  }

  template <bool kMasked>
  __device__ float2 softmax(float (&scores)[kScores], int n) {
    if (arguments_.sign != 1.0f) {
#pragma unroll
      for (int i = 0; i < kScores; ++i) {
        scores[i] *= arguments_.sign;
      }
    }
    if constexpr (kMasked) {
#pragma unroll
      for (int i = 0; i < kScores; ++i) {
        const int column = n * Tiles::kKeys + i / 4 * 8 + thread_ % 4 * 2 + i % 2;
        const int seen = kCausal ? min(tile_.rows, row(i / 2 % 2) + 1) : tile_.rows;
        scores[i] = column < seen ? scores[i] : kAbsentLse<float>;
      }
    }
    return tile_softmax<kMasked, kPolynomial>(scores, sums_, arguments_.factor);
  }

  __device__ void attend() {
    float scores[kScores];
    std::uint32_t probabilities[kScores / 8][4];
    sums_ = RowSums{};
    const int count = key_tiles<kCausal, Tiles::kRows, Tiles::kKeys>(tile_);
    const int first = tile_.first_row + first_row_;
    // Tiles below this one need no mask.
    const int plain = (kCausal ? min(tile_.rows, first + 1) : tile_.rows) / Tiles::kKeys;

    shared_.query_full.wait(queries_.parity);
    queries_.step();
    score(scores);
    wait_products<0>();
    pin(scores);
    arrive(shared_.key_empty[keys_.stage]);
    keys_.step();
    softmax<true>(scores, count - 1);
    pack_operands<Element>(scores, probabilities);

    const auto step = [&]<bool kMasked>(int n) {
      score(scores);
      shared_.value_full[values_.stage].wait(values_.parity);
      if (n == count - 2) {
        clear_values(count - 1);
      }
      add_values(probabilities, n < count - 2);
      wait_products<1>();
      pin(scores);
      arrive(shared_.key_empty[keys_.stage]);
      keys_.step();
      const float2 shrink = softmax<kMasked>(scores, n);
      wait_products<0>();
      pin(acc_);
      arrive(shared_.value_empty[values_.stage]);
      values_.step();
#pragma unroll
      for (int i = 0; i < kHeadDim / 2; ++i) {
        acc_[i] *= i / 2 % 2 == 0 ? shrink.x : shrink.y;
      }
      pack_operands<Element>(scores, probabilities);
    };
    int n = count - 2;
    for (; n >= plain; --n) {
      step.template operator()<true>(n);
    }
    for (; n >= 0; --n) {
      step.template operator()<false>(n);
    }
    arrive(shared_.query_empty);

    shared_.value_full[values_.stage].wait(values_.parity);
    if (count == 1) {
      clear_values(0);
    }
    add_values(probabilities, count > 1);
    wait_products<0>();
    pin(acc_);
    arrive(shared_.value_empty[values_.stage]);
    values_.step();
  }

  /// Slot of position `p` in the partial results of a branch; -1 if the head does not see it there.
  __device__ std::int64_t partial_row(int b, int p) const {
    const BranchRows& rows = arguments_.partials[b];
    const auto position = static_cast<unsigned>(p);
    const unsigned segment = position / static_cast<unsigned>(rows.segment);
    const unsigned inside = position - segment * static_cast<unsigned>(rows.segment);
    const unsigned i = inside / static_cast<unsigned>(rows.dilation);
    const int offset = arguments_.partial_offsets[b * arguments_.heads + tile_.head];
    if (static_cast<int>(inside - i * static_cast<unsigned>(rows.dilation)) != offset) {
      return -1;
    }
    return row_of_slot(rows, static_cast<int>(segment), static_cast<int>(i));
  }
  __device__ std::int64_t row_of_slot(const BranchRows& rows, int segment, int i) const {
    return (std::int64_t{tile_.batch} * arguments_.heads + tile_.head) * arguments_.partial_rows +
           rows.row_begin + std::int64_t{segment} * rows.slots + i;
  }

  __device__ void finish() {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float sum = quad_sum(sums_.sum[i]);
      const float inverse = sum > 0.0f ? 1.0f / sum : sum == 0.0f ? 0.0f : sum;
#pragma unroll
      for (int j = 0; j < kHeadDim / 8; ++j) {
        acc_[4 * j + 2 * i] *= inverse;
        acc_[4 * j + 2 * i + 1] *= inverse;
      }
      if (row(i) >= tile_.rows) {
        continue;
      }
      const ScaledSum<float> total = {
          sum == 0.0f ? kAbsentLse<float> : reference_of(sums_.max[i], arguments_.factor), sum};
      if constexpr (kMerges) {
        write_merged(i, total);
      } else {
        write_partial(i, total);
      }
    }
  }

  __device__ void write_partial(int i, const ScaledSum<float>& total) {
    const std::int64_t slot =
        row_of_slot(arguments_.branches[tile_.branch].rows, tile_.segment, row(i));
    float* out = arguments_.partial_out + slot * kHeadDim + thread_ % 4 * 2;
#pragma unroll
    for (int j = 0; j < kHeadDim / 8; ++j) {
      *reinterpret_cast<float2*>(out + 8 * j) = {acc_[4 * j + 2 * i], acc_[4 * j + 2 * i + 1]};
    }
    if (thread_ % 4 == 0) {
      arguments_.partial_sums[slot] = {total.max, total.sum};
    }
  }

  __device__ void write_merged(int i, ScaledSum<float> total) {
    const int position = tile_.position + row(i);
    for (int b = 0; b < arguments_.num_partials; ++b) {
      const std::int64_t slot = partial_row(b, position);
      if (slot < 0) {
        continue;
      }
      const float2 sums = arguments_.partial_sums[slot];
      const auto merged =
          merge_sums(total, ScaledSum<float>{sums.x, sums.y}, [](float x) { return exp2_unit(x); });
      total = merged.total;
      const float* partial = arguments_.partial_out + slot * kHeadDim + thread_ % 4 * 2;
#pragma unroll
      for (int j = 0; j < kHeadDim / 8; ++j) {
        const float2 other = *reinterpret_cast<const float2*>(partial + 8 * j);
        float* own = acc_ + 4 * j + 2 * i;
        own[0] = fmaf(own[0], merged.first, other.x * merged.second);
        own[1] = fmaf(own[1], merged.first, other.y * merged.second);
      }
    }
    auto* out = static_cast<Element*>(arguments_.out) + tile_.batch * arguments_.out_batch_stride +
                position * arguments_.out_row_stride + tile_.head * arguments_.out_head_stride +
                thread_ % 4 * 2;
#pragma unroll
    for (int j = 0; j < kHeadDim / 8; ++j) {
      *reinterpret_cast<std::uint32_t*>(out + 8 * j) =
          pack<Element>(acc_[4 * j + 2 * i], acc_[4 * j + 2 * i + 1]);
    }
    if (thread_ % 4 == 0) {
      constexpr float kLn2 = 0.6931471805599453f;
      arguments_
          .lse[(std::int64_t{tile_.batch} * arguments_.heads + tile_.head) * arguments_.length +
               position] = (total.max + __log2f(total.sum)) * kLn2;
    }
  }

  const ForwardArguments& arguments_;
  Shared& shared_;
  const int thread_;     // of the warpgroup
  const int first_row_;  // of the warpgroup in the tile
  QueryTile tile_;
  Ring<Tiles::kStages> keys_, values_;
  Ring<1> queries_;
  RowSums sums_;
  float acc_[kHeadDim / 2];
};

template <typename Element, int kHeadDim, bool kCausal, bool kMerges, int kPolynomial>
__global__ void __launch_bounds__(ForwardTiles<kHeadDim>::kThreads, 1)
    forward_kernel(const __grid_constant__ ForwardArguments arguments) {
  using Tiles = ForwardTiles<kHeadDim>;
  using Shared = ForwardShared<Element, kHeadDim>;
  extern __shared__ __align__(1024) unsigned char memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  if (threadIdx.x == 0) {
    constexpr std::uint32_t kWarps = 4 * Tiles::kWarpgroups;
    shared.query_full.init(1);
    shared.query_empty.init(kWarps);
    for (int i = 0; i < Tiles::kStages; ++i) {
      shared.key_full[i].init(1);
      shared.key_empty[i].init(kWarps);
      shared.value_full[i].init(1);
      shared.value_empty[i].init(kWarps);
    }
    for (int i = 0; i < 2; ++i) {
      shared.tile_full[i].init(1);
      shared.tile_empty[i].init(kWarps);
    }
    fence_barrier_init();
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    give_registers<Tiles::kProducerRegisters>();
    if (threadIdx.x == 0) {
      produce<Element, kHeadDim, kCausal>(arguments, shared);
    }
  } else {
    take_registers<Tiles::kConsumerRegisters>();
    Consumer<Element, kHeadDim, kCausal, kMerges, kPolynomial>(arguments, shared).run();
  }
}

}  // namespace dilated::gpu
