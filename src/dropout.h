// Dropout of attention probabilities: Philox4x32-10, one draw per (sequence, head, branch, query,
// key). A pure function of global indices, so tiles, threads, windows and ranks agree and backward
// regenerates the mask.
#pragma once

#include <cstddef>
#include <cstdint>

namespace dilated {

/// Number of the stream of one (sequence, head, branch); `head` counts in all heads of the model.
constexpr std::uint64_t dropout_stream(std::int64_t sequence, std::int64_t head,
                                       std::int64_t total_heads, std::size_t branch,
                                       std::size_t num_branches) {
  return static_cast<std::uint64_t>(sequence * total_heads + head) * num_branches + branch;
}

/// Key of one dropout stream.
constexpr std::uint64_t dropout_key(std::uint64_t seed, std::uint64_t offset,
                                    std::uint64_t stream) {
  const auto mix = [](std::uint64_t z) {  // splitmix64 finaliser
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
  };
  return mix(mix(seed + offset * 0x9E3779B97F4A7C15u) + stream);
}

/// A probability is kept iff its draw is below this: (1 - p) 2^32, so p = 0 keeps all and p = 1
/// none.
constexpr std::uint64_t dropout_threshold(double p) {
  return static_cast<std::uint64_t>((1.0 - p) * 4294967296.0);
}

/// First word of Philox4x32-10 with key `key` and counter (p, j); positions within the sequence.
constexpr std::uint32_t dropout_draw(std::uint64_t key, std::uint64_t p, std::uint64_t j) {
  auto k0 = static_cast<std::uint32_t>(key);
  auto k1 = static_cast<std::uint32_t>(key >> 32);
  auto c0 = static_cast<std::uint32_t>(p);
  auto c1 = static_cast<std::uint32_t>(j);
  auto c2 = static_cast<std::uint32_t>(p >> 32);
  auto c3 = static_cast<std::uint32_t>(j >> 32);
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t a = static_cast<std::uint64_t>(c0) * 0xD2511F53u;
    const std::uint64_t b = static_cast<std::uint64_t>(c2) * 0xCD9E8D57u;
    c0 = static_cast<std::uint32_t>(b >> 32) ^ c1 ^ k0;
    c1 = static_cast<std::uint32_t>(b);
    c2 = static_cast<std::uint32_t>(a >> 32) ^ c3 ^ k1;
    c3 = static_cast<std::uint32_t>(a);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c0;
}

/// Draws of one stream.
class Dropout {
 public:
  constexpr Dropout(double p, std::uint64_t seed, std::uint64_t offset, std::uint64_t stream)
      : key_(dropout_key(seed, offset, stream)),
        threshold_(dropout_threshold(p)),
        factor_(p < 1.0 ? 1.0 / (1.0 - p) : 0.0) {}

  /// 1 / (1 - p) if the probability of this pair is kept, else 0.
  constexpr double operator()(std::int64_t query, std::int64_t key) const {
    return dropout_draw(key_, static_cast<std::uint64_t>(query), static_cast<std::uint64_t>(key)) <
                   threshold_
               ? factor_
               : 0.0;
  }

 private:
  std::uint64_t key_;
  std::uint64_t threshold_;
  double factor_;
};

}  // namespace dilated
