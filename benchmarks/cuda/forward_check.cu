// Forward on Hopper by itself: against float64 sums on the host, then timed on the rows of the
// issue. `forward_check check`, `forward_check time`.
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "benchmarks/cuda/measure.cuh"
#include "src/geometry.h"
#include "src/kernels/cuda/attention_forward_sm90.h"

namespace {

using dilated::Branch;
using dilated::BranchGeometry;

struct Case {
  std::string name;
  std::int64_t batch, length, heads, kv_heads, head_dim;
  std::vector<std::int64_t> segments, dilations;
  bool is_causal;
  float amplitude = 1.7f;
  float scale = 0.0f;        // 0: head_dim^-1/2
  int missing_head = -1;     // takes no part in the last branch
  std::int64_t poison = -1;  // first of 100 positions whose values are NaN
};

std::vector<Branch> branches_of(const Case& c) {
  std::vector<Branch> branches;
  for (std::size_t b = 0; b < c.segments.size(); ++b) {
    Branch branch{c.segments[b], c.dilations[b], {}};
    for (std::int64_t h = 0; h < c.heads; ++h) {
      branch.offsets.push_back(h / (c.heads / c.kv_heads) % c.dilations[b]);
    }
    if (b + 1 == c.segments.size() && c.missing_head >= 0) {
      branch.offsets[static_cast<std::size_t>(c.missing_head)] = -1;
    }
    branches.push_back(branch);
  }
  return branches;
}

template <typename Element>
struct Tensors {
  bench::Buffer<Element> query, key, value, out;
  bench::Buffer<float> lse, partial_out, partial_sums;
  bench::Buffer<int> tickets;
  dilated::gpu::ForwardCall call;

  explicit Tensors(const Case& c)
      : query(c.batch * c.length * c.heads * c.head_dim),
        key(c.batch * c.length * c.kv_heads * c.head_dim),
        value(c.batch * c.length * c.kv_heads * c.head_dim),
        out(query.size()),
        lse(c.batch * c.heads * c.length),
        partial_out(std::max<std::int64_t>(1, rows(c) * c.batch * c.heads * c.head_dim)),
        partial_sums(std::max<std::int64_t>(1, rows(c) * c.batch * c.heads * 2)),
        tickets(2) {
    bench::fill(query, 1, c.amplitude);
    bench::fill(key, 2, c.amplitude);
    bench::fill(value, 3, c.amplitude);
    const auto view = [&](Element* data, std::int64_t heads) {
      return dilated::gpu::ForwardCall::View{data, c.length * heads * c.head_dim,
                                             heads * c.head_dim, c.head_dim};
    };
    call.dtype =
        std::is_same_v<Element, __half> ? dilated::DType::kFloat16 : dilated::DType::kBFloat16;
    call.is_causal = c.is_causal;
    call.scale = scale(c);
    call.batch = c.batch;
    call.length = c.length;
    call.heads = c.heads;
    call.kv_heads = c.kv_heads;
    call.head_dim = c.head_dim;
    call.query = view(query.data(), c.heads);
    call.key = view(key.data(), c.kv_heads);
    call.value = view(value.data(), c.kv_heads);
    call.out = view(out.data(), c.heads);
    call.lse = lse.data();
    call.branches = branches_of(c);
    call.partial_out = partial_out.data();
    call.partial_sums = partial_sums.data();
    call.tickets = tickets.data();
  }
  static std::int64_t rows(const Case& c) {
    return dilated::gpu::partial_rows(c.length, branches_of(c));
  }
  static float scale(const Case& c) {
    return c.scale != 0.0f ? c.scale : 1.0f / std::sqrt(static_cast<float>(c.head_dim));
  }
};

template <typename Element>
class Reference {
 public:
  explicit Reference(const Case& c) : case_(c), branches_(branches_of(c)) {}

  double value(int seed, std::int64_t b, std::int64_t p, std::int64_t h, std::int64_t heads,
               std::int64_t d) const {
    const std::int64_t index = ((b * case_.length + p) * heads + h) * case_.head_dim + d;
    return static_cast<float>(static_cast<Element>(
        bench::value_at(seed, static_cast<std::uint64_t>(index), case_.amplitude)));
  }

  /// O of one row, and its log-sum-exp.
  double row(std::int64_t b, std::int64_t h, std::int64_t p, std::vector<double>& out) const {
    const std::int64_t kv = h / (case_.heads / case_.kv_heads);
    std::vector<std::int64_t> keys;
    for (const Branch& branch : branches_) {
      const BranchGeometry geometry(case_.length, branch.segment, branch.dilation);
      const std::int64_t offset = branch.offsets[static_cast<std::size_t>(h)];
      if (!geometry.covers(p, offset)) {
        continue;
      }
      const std::int64_t s = p / geometry.segment;
      for (std::int64_t i = 0; i < geometry.rows(s, offset); ++i) {
        const std::int64_t j = geometry.position(s, offset, i);
        if (!case_.is_causal || j <= p) {
          keys.push_back(j);
        }
      }
    }
    std::vector<double> scores;
    double max = -std::numeric_limits<double>::infinity();
    std::vector<double> query(static_cast<std::size_t>(case_.head_dim));
    for (std::size_t d = 0; d < query.size(); ++d) {
      query[d] = value(1, b, p, h, case_.heads, static_cast<std::int64_t>(d));
    }
    for (const std::int64_t j : keys) {
      double score = 0;
      for (std::size_t d = 0; d < query.size(); ++d) {
        score += query[d] * value(2, b, j, kv, case_.kv_heads, static_cast<std::int64_t>(d));
      }
      scores.push_back(score * Tensors<Element>::scale(case_));
      max = std::max(max, scores.back());
    }
    double sum = 0;
    out.assign(query.size(), 0.0);
    for (std::size_t k = 0; k < keys.size(); ++k) {
      const double weight = std::exp(scores[k] - max);
      sum += weight;
      for (std::size_t d = 0; d < out.size(); ++d) {
        out[d] += weight * value(3, b, keys[k], kv, case_.kv_heads, static_cast<std::int64_t>(d));
      }
    }
    for (double& x : out) {
      x /= sum;
    }
    return max + std::log(sum);
  }

 private:
  const Case& case_;
  std::vector<Branch> branches_;
};

template <typename Element>
bool check(const Case& c) {
  Tensors<Element> tensors(c);
  if (c.poison >= 0) {
    bench::check(cudaMemset(tensors.value.data() + c.poison * c.kv_heads * c.head_dim, 0xFF,
                            static_cast<std::size_t>(100 * c.kv_heads * c.head_dim) * 2));
  }
  dilated::gpu::forward_sm90(tensors.call);
  bench::check(cudaDeviceSynchronize());
  const std::vector<Element> out = tensors.out.host();
  const std::vector<float> lse = tensors.lse.host();
  tensors.out.poison();
  tensors.lse.poison();
  tensors.partial_out.poison();
  dilated::gpu::forward_sm90(tensors.call);
  bench::check(cudaDeviceSynchronize());
  const std::vector<Element> again = tensors.out.host();
  const bool same = std::memcmp(out.data(), again.data(), out.size() * sizeof(Element)) == 0;

  std::int64_t missing = 0;
  const BranchGeometry poisoned(c.length, c.segments[0], 1);
  for (std::size_t i = 0; i < out.size(); ++i) {
    const std::int64_t p = static_cast<std::int64_t>(i) / (c.heads * c.head_dim) % c.length;
    const bool sees_poison = c.poison >= 0 && p / poisoned.segment == c.poison / poisoned.segment;
    missing += std::isfinite(static_cast<float>(out[i])) || sees_poison ? 0 : 1;
  }
  const Reference<Element> reference(c);
  const std::int64_t total = c.batch * c.heads * c.length;
  const std::int64_t step = std::max<std::int64_t>(1, total / 500) | 1;
  double error = 0;
  double norm = 0;
  double largest = 0;
  double lse_error = 0;
  std::vector<double> row;
  for (std::int64_t k = 0; k < total; k += step) {
    const std::int64_t p = k % c.length;
    const std::int64_t h = k / c.length % c.heads;
    const std::int64_t b = k / c.length / c.heads;
    if (c.poison >= 0 && p / poisoned.segment == c.poison / poisoned.segment) {
      continue;
    }
    const double expected = reference.row(b, h, p, row);
    lse_error = std::max(lse_error, std::abs(lse[static_cast<std::size_t>(k)] - expected));
    for (std::size_t d = 0; d < row.size(); ++d) {
      const std::size_t index = static_cast<std::size_t>(
          ((b * c.length + p) * c.heads + h) * c.head_dim + static_cast<std::int64_t>(d));
      const double off = static_cast<float>(out[index]) - row[d];
      error += off * off;
      norm += row[d] * row[d];
      largest = std::max(largest, std::abs(off));
    }
  }
  error = std::sqrt(error / norm);
  const double limit = std::is_same_v<Element, __half> ? 1e-3 : 6e-3;
  const bool good = error < limit && lse_error < 1e-3 && missing == 0 && same;
  std::printf("%-4s %-28s %s: |error| / |O| %.2e, largest %.2e, lse %.1e, not finite %lld, %s\n",
              good ? "ok" : "BAD", c.name.c_str(),
              std::is_same_v<Element, __half> ? "float16" : "bfloat16", error, largest, lse_error,
              static_cast<long long>(missing), same ? "same bits" : "bits DIFFER");
  return good;
}

double pairs_of(const Case& c) {
  double pairs = 0;
  for (const Branch& branch : branches_of(c)) {
    const BranchGeometry geometry(c.length, branch.segment, branch.dilation);
    for (const std::int64_t offset : branch.offsets) {
      for (std::int64_t s = 0; s < geometry.num_segments(); ++s) {
        const auto m = static_cast<double>(geometry.rows(s, offset));
        pairs += c.is_causal ? m * (m + 1) / 2 : m * m;
      }
    }
  }
  return pairs * static_cast<double>(c.batch);
}

void time(const Case& c) {
  Tensors<__nv_bfloat16> tensors(c);
  const double ms = bench::median_ms([&] { dilated::gpu::forward_sm90(tensors.call); });
  bench::check(cudaDeviceSynchronize());
  const double flop = 4.0 * static_cast<double>(c.head_dim) * pairs_of(c);
  std::printf("time %-24s %8.3f ms %6.0f TFLOP/s\n", c.name.c_str(), ms, flop / ms * 1e-9);
}

const std::vector<std::int64_t> kWindows = {2048, 4096, 8192, 16384, 32768};

}  // namespace

int main(int argc, char** argv) {
  const std::string what = argc > 1 ? argv[1] : "";
  if (what == "check") {
    bool good = true;
    for (const bool causal : {false, true}) {
      const std::string mask = causal ? " causal" : " full";
      for (const std::int64_t d : {std::int64_t{64}, std::int64_t{128}}) {
        const std::string name = "d" + std::to_string(d) + mask;
        for (const Case& c : std::vector<Case>{
                 {"dense " + name, 1, 2048, 2, 2, d, {2048}, {1}, causal},
                 {"aligned " + name,
                  2,
                  4096,
                  4,
                  4,
                  d,
                  {512, 1024, 2048, 4096},
                  {1, 2, 4, 8},
                  causal},
                 {"ragged " + name, 2, 5003, 4, 2, d, {700, 1501, 4000}, {1, 3, 7}, causal},
                 {"short " + name, 3, 37, 4, 1, d, {16, 64}, {1, 50}, causal},
                 {"scores " + name, 1, 1000, 2, 2, d, {256, 1024}, {1, 2}, causal, 6.0f, -0.9f},
                 {"missing " + name, 1, 2000, 4, 4, d, {500, 2000}, {1, 4}, causal, 1.7f, 0.0f, 1},
                 {"poison " + name, 1, 2100, 2, 2, d, {700}, {1}, causal, 1.7f, 0.0f, -1, 700}}) {
          good = check<__nv_bfloat16>(c) && good;
          good = check<__half>(c) && good;
        }
      }
    }
    std::printf(good ? "all good\n" : "FAILED\n");
    return good ? 0 : 1;
  }
  if (what == "time") {
    const std::vector<std::int64_t> paper = {1, 2, 4, 6, 12};
    const std::vector<std::int64_t> geometric = {1, 2, 4, 8, 16};
    for (const Case& c :
         std::vector<Case>{{"dense n 2048 d 64 full", 64, 2048, 16, 16, 64, {2048}, {1}, false},
                           {"dense n 2048 d 64 causal", 64, 2048, 16, 16, 64, {2048}, {1}, true},
                           {"dense n 2048 d 128 full", 64, 2048, 16, 16, 128, {2048}, {1}, false},
                           {"dense n 2048 d 128 causal", 64, 2048, 16, 16, 128, {2048}, {1}, true},
                           {"dense n 16384 d 128 full", 8, 16384, 16, 16, 128, {16384}, {1}, false},
                           {"P64", 1, 131072, 12, 12, 64, kWindows, paper, true},
                           {"G128c", 1, 131072, 16, 16, 128, kWindows, geometric, true},
                           {"G128f", 1, 131072, 16, 16, 128, kWindows, geometric, false},
                           {"M64",
                            1,
                            1048576,
                            16,
                            16,
                            64,
                            {2048, 8192, 32768, 131072, 524288},
                            {1, 4, 16, 16, 16},
                            false}}) {
      time(c);
    }
    return 0;
  }
  return 2;
}
