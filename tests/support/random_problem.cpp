// Generators of segments, dilations, offsets, lengths, masks and every other option.
#include "tests/support/random_problem.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>

#include <gtest/gtest.h>
#include <rapidcheck.h>

#include "src/sequences.h"

namespace dilated::testing {
namespace {

std::int64_t in(std::int64_t low, std::int64_t high) {
  return *rc::gen::inRange<std::int64_t>(low, high + 1);
}
bool one_in(std::int64_t n) { return in(0, n - 1) == n - 1; }

Layout draw_layout() { return *rc::gen::element(Layout::kBshd, Layout::kBhsd, Layout::kGaps); }

std::vector<std::int64_t> draw_cu_seqlens(std::int64_t n) {
  std::vector<std::int64_t> cu = {0};
  for (std::int64_t s = in(0, 4); s > 0; --s) {
    cu.push_back(in(0, n));  // equal neighbours are empty sequences
  }
  cu.push_back(n);
  std::ranges::sort(cu);
  return cu;
}

}  // namespace

RandomCase draw_case(const RandomOptions& options) {
  Problem problem;
  problem.dtype = options.dtype;
  problem.seqlen = in(0, options.max_seqlen);
  problem.num_kv_heads = in(1, 3);
  problem.num_heads = problem.num_kv_heads * in(1, 3);
  problem.head_dim = in(1, options.max_head_dim);
  if (one_in(4)) {
    problem.head_offset = in(0, 3);
    problem.total_heads = problem.head_offset + problem.num_heads + in(0, 3);
  }
  if (one_in(3)) {
    problem.cu_seqlens = draw_cu_seqlens(problem.seqlen);
  } else {
    problem.batch = in(0, 3);
  }
  for (std::int64_t b = in(1, 4); b > 0; --b) {
    Branch branch{in(1, options.max_seqlen + 10), in(1, 9), {}};
    for (std::int64_t h = 0; h < problem.num_heads; ++h) {
      branch.offsets.push_back(in(-1, branch.dilation - 1));
    }
    problem.branches.push_back(branch);
  }
  problem.merge = *rc::gen::element(Merge::kLse, Merge::kSum, Merge::kMean);
  problem.out_scale = *rc::gen::element(1.0, 0.5, -1.5, 0.0);
  problem.lse_grad = problem.merge != Merge::kLse || !one_in(2);
  problem.tail = *rc::gen::element(Tail::kMask, Tail::kPhantom);
  problem.is_causal = one_in(2);
  if (one_in(2)) {
    // Near head_dim^-1/2: the tolerance rule is about ordinary scores, large ones have tests of
    // their own (M14).
    problem.scale =
        *rc::gen::element(1.5, -1.0, 0.5, 0.0) / std::sqrt(static_cast<double>(problem.head_dim));
  }
  problem.dropout_p = one_in(3) ? *rc::gen::element(0.25, 0.6, 1.0) : 0.0;
  problem.has_key_mask = one_in(3);
  problem.has_seqused = one_in(3);

  InputOptions input_options;
  input_options.amplitude = 1.5;
  input_options.with_dlse = one_in(2);
  input_options.layout = draw_layout();
  input_options.first_seed = static_cast<std::uint64_t>(in(1, 1000));
  RandomCase result{problem, make_inputs(problem, input_options)};
  for (std::uint8_t& key : result.inputs.key_mask) {
    key = static_cast<std::uint8_t>(in(0, 3) != 0);
  }
  for (std::size_t s = 0; s < result.inputs.seqused.size(); ++s) {
    result.inputs.seqused[s] = in(0, sequences_of(problem)[s].length);
  }
  result.inputs.dropout_state = {in(0, 1'000'000), in(0, 5)};
  return result;
}

int effort(int count) {
  const char* factor = std::getenv("DILATED_TEST_EFFORT");
  return factor == nullptr ? count : std::max(1, static_cast<int>(count * std::atof(factor)));
}

void check_property(const char* name, int count, const RandomOptions& options,
                    const std::function<std::string(const RandomCase&)>& body) {
  rc::detail::TestMetadata metadata;
  metadata.id = name;
  metadata.description = name;
  rc::detail::TestParams params = rc::detail::configuration().testParams;
  params.maxSuccess = effort(count);
  const auto result = rc::detail::checkTestable(
      [&] {
        const RandomCase drawn = draw_case(options);
        const std::string problem_text = to_string(drawn.problem);
        RC_LOG() << problem_text << std::endl;
        const std::string failure = body(drawn);
        if (!failure.empty()) {
          RC_FAIL(failure);
        }
      },
      metadata, params);
  if (!result.template is<rc::detail::SuccessResult>()) {
    std::ostringstream text;
    rc::detail::printResultMessage(result, text);
    ADD_FAILURE() << name << ", RapidCheck seed " << params.seed << "\n" << text.str();
  }
}

}  // namespace dilated::testing
