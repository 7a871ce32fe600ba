// Scratch memory of one thread: how the tiles of forward and backward are cut from the call's
// workspace. The same `carve` runs once with null memory to count bytes and then with real memory,
// so that the formula of `workspace_bytes` and the use of it cannot differ.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "dilated/problem.h"

namespace dilated::cpu {

/// Queries (forward) or keys (backward) that lie side by side in vectors of one tile.
inline constexpr std::int64_t kTileLanes = 64;
/// Keys of one forward tile. Tiles start at multiples of it in a segment's packed index.
inline constexpr std::int64_t kForwardKeys = 128;
/// Query rows of one backward tile.
inline constexpr std::int64_t kBackwardRows = 64;
static_assert(kTileLanes % 16 == 0, "a tile's lanes are whole vectors of any width");
static_assert(kForwardKeys % kTileLanes == 0 && kBackwardRows % 4 == 0,
              "`transpose` works in blocks of 4 x 4");

constexpr std::int64_t round_up(std::int64_t value, std::int64_t step) {
  return (value + step - 1) / step * step;
}

/// Row length of tiles whose vectors run along head_dim: whole vectors of any width up to 16
/// floats.
constexpr std::int64_t padded_head_dim(std::int64_t head_dim) { return round_up(head_dim, 16); }

/// Hands out 64-byte aligned pieces of memory, or counts bytes if memory is null.
class Carver {
 public:
  explicit Carver(std::byte* memory) : memory_(memory) {}

  template <typename T>
  T* take(std::int64_t count) {
    T* const piece = memory_ == nullptr ? nullptr : reinterpret_cast<T*>(memory_ + bytes_);
    bytes_ += round_up(count * static_cast<std::int64_t>(sizeof(T)), 64);
    return piece;
  }
  std::int64_t bytes() const { return bytes_; }

 private:
  std::byte* memory_;
  std::int64_t bytes_ = 0;
};

/// T = rows of a work item, C = rows of one class at a time, d = head_dim, e = padded_head_dim.
struct ForwardScratch {
  float* state_out;       // (T, e) merged output of the block
  float* state_max;       // (T) merged maximum of q.k
  float* state_sum;       // (T) merged sum of powers of 2
  float* query;           // (C / 64, d, 64) packed, with the sign of scale
  float* sums;            // (C / 64, d, 64) unnormalised output of one branch
  float* row_max;         // (C) running maximum of q.k
  float* row_sum;         // (C)
  float* key;             // (kForwardKeys, d)
  float* value;           // (kForwardKeys, d)
  std::int64_t* key_row;  // (kForwardKeys) packed index of each packed key
  float* score;           // (kForwardKeys, 64)
  float* tile_max;        // (64) maximum of one score tile
  float* rescale;         // (64) factor of older sums
  float* rows;            // (64, e) normalised rows of one query tile

  ForwardScratch(Carver& carver, std::int64_t t, std::int64_t c, std::int64_t d) {
    const std::int64_t e = padded_head_dim(d);
    state_out = carver.take<float>(t * e);
    state_max = carver.take<float>(t);
    state_sum = carver.take<float>(t);
    query = carver.take<float>(c * d);
    sums = carver.take<float>(c * d + 4 * kTileLanes);  // `transpose` reads whole blocks of 4 rows
    row_max = carver.take<float>(c);
    row_sum = carver.take<float>(c);
    key = carver.take<float>(kForwardKeys * d);
    value = carver.take<float>(kForwardKeys * d);
    key_row = carver.take<std::int64_t>(kForwardKeys);
    score = carver.take<float>(kForwardKeys * kTileLanes);
    tile_max = carver.take<float>(kTileLanes);
    rescale = carver.take<float>(kTileLanes);
    rows = carver.take<float>(kTileLanes * e);
  }
};

/// C = query rows of a chunk, d = head_dim, e = padded_head_dim.
struct BackwardScratch {
  float* query;           // (C, d) with the sign of scale, as in forward
  float* dout;            // (C, d)
  float* dquery;          // (C, e) without the factor scale
  float* row_base;        // (C) of lse_row; +inf for rows that contribute nothing
  float* row_residual;    // (C) of lse_row
  float* row_delta;       // (C)
  float* key;             // (64, e)
  float* key_columns;     // (d, 64)
  float* value_columns;   // (d, 64)
  float* dkey_columns;    // (d, 64) without the factor |scale|
  float* dvalue_columns;  // (d, 64)
  std::int64_t* key_row;  // (64) packed index of each packed key
  float* probability;     // (kBackwardRows, 64)
  float* dscore;          // (kBackwardRows, 64)
  float* rows;            // (64, e) rows on their way

  BackwardScratch(Carver& carver, std::int64_t c, std::int64_t d) {
    const std::int64_t e = padded_head_dim(d);
    query = carver.take<float>(c * d);
    dout = carver.take<float>(c * d);
    dquery = carver.take<float>(c * e);
    row_base = carver.take<float>(c);
    row_residual = carver.take<float>(c);
    row_delta = carver.take<float>(c);
    key = carver.take<float>(kTileLanes * e);
    key_columns = carver.take<float>(kTileLanes * d);
    value_columns = carver.take<float>(kTileLanes * d);
    dkey_columns =
        carver.take<float>(kTileLanes * (d + 4));  // `transpose` reads whole blocks of 4 rows
    dvalue_columns = carver.take<float>(kTileLanes * (d + 4));
    key_row = carver.take<std::int64_t>(kTileLanes);
    probability = carver.take<float>(kBackwardRows * kTileLanes);
    dscore = carver.take<float>(kBackwardRows * kTileLanes);
    rows = carver.take<float>(kTileLanes * e);
  }
};

/// Bytes of one thread's scratch; arguments are those of its constructor.
template <typename Scratch, typename... Sizes>
std::int64_t scratch_bytes(Sizes... sizes) {
  Carver counter(nullptr);
  const Scratch scratch(counter, sizes...);
  return counter.bytes();
}

}  // namespace dilated::cpu
