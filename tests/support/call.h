// One call of the operator as tests make it: inputs, poisoned outputs, guarded workspace, results.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "dilated/attention.h"

#include "tests/support/tensor.h"

namespace dilated::testing {

/// Element i of stream `seed`, uniform in [-1, 1) (semantics §11).
double val(std::uint64_t seed, std::uint64_t i);

struct Inputs {
  Tensor query, key, value, dout;
  std::optional<Tensor> dlse;          // (batch, heads, seqlen, 1)
  std::vector<std::uint8_t> key_mask;  // (batch, seqlen), empty if the problem has none
  std::vector<std::int64_t> seqused;
  std::array<std::int64_t, 2> dropout_state{};  // seed, offset
  Tensor class_key = {}, class_value = {};      // with KeyLayout::kClassRows

  /// The same values in float64.
  Inputs in_float64() const;
  Masks masks(const Problem& problem) const;
};

struct InputOptions {
  double amplitude = 2.0;
  bool with_dlse = false;
  Layout layout = Layout::kBshd;
  std::uint64_t first_seed = 1;  // query, key, value, dout and dlse take five seeds in a row
};

/// Streams of `val` in the problem's shapes and dtype. Masks drop every third key, seqused cuts a
/// third.
Inputs make_inputs(const Problem& problem, const InputOptions& options = {});

struct Results {
  Tensor out, lse, dquery, dkey, dvalue;
  Tensor dclass_key = {}, dclass_value = {};
};

struct RunOptions {
  std::string backend = {};
  const ParallelFor* parallel_for = nullptr;
  Layout layout = Layout::kBshd;  // of the outputs
  bool unrounded = false;         // out, dquery, dkey and dvalue in float32 (float64)
};

/// Forward and backward. Throws std::logic_error if memory beside outputs or workspace was written.
Results run(const Problem& problem, const Inputs& inputs, const RunOptions& options = {});
Results run(const Plan& plan, const Inputs& inputs, const RunOptions& options = {});

/// Runs the reference back end in float64 on the values of `inputs`.
Results reference(const Problem& problem, const Inputs& inputs);

/// Problem of `Options`-free tests: every head runs every branch with paper offsets h mod r.
Problem paper_problem(std::int64_t seqlen, std::int64_t heads, std::int64_t head_dim,
                      const std::vector<std::pair<std::int64_t, std::int64_t>>& branches);

/// Names of the five results, with pointers to members, for loops.
struct NamedResult {
  std::string_view name;
  Tensor Results::* member;
};
inline constexpr std::array<NamedResult, 5> kResults = {{{"out", &Results::out},
                                                         {"lse", &Results::lse},
                                                         {"dquery", &Results::dquery},
                                                         {"dkey", &Results::dkey},
                                                         {"dvalue", &Results::dvalue}}};

/// First difference of any of the five results, or empty.
std::string difference(const Results& a, const Results& b, double tolerance);
std::string bit_difference(const Results& a, const Results& b);

}  // namespace dilated::testing
