// Windows (semantics §3): any partition of the keys merges to the whole, any partition of the
// queries has the whole's bits, gradients of all windows sum to the whole's.
#include <algorithm>
#include <set>

#include <gtest/gtest.h>
#include <rapidcheck.h>

#include "dilated/error.h"
#include "dilated/merge.h"

#include "src/geometry.h"
#include "src/sequences.h"
#include "tests/support/materialised.h"
#include "tests/support/random_problem.h"

namespace dilated::testing {
namespace {

constexpr int kDraws = 32;  // of the yardstick, see rule_violation

/// One call that holds a window of every sequence of a whole problem.
struct Part {
  Problem problem;
  Inputs inputs;
  std::vector<std::array<std::int64_t, 2>> query_rows;  // (batch, row) in the whole's tensors
  std::vector<std::array<std::int64_t, 2>> key_rows;
};

using RowMap = std::vector<std::array<std::int64_t, 2>>;

RowMap rows_of(const Problem& whole, const std::vector<Window>& windows, Range Window::* side) {
  RowMap rows;
  const std::vector<Sequence> sequences = sequences_of(whole);
  for (std::size_t s = 0; s < windows.size(); ++s) {
    const Range range = windows[s].*side;
    for (std::int64_t p = range.begin; p < range.end; ++p) {
      rows.push_back({sequences[s].batch, sequences[s].query_row + p});
    }
  }
  return rows;
}

/// Rows `rows` of a (batch, rows, heads, d) tensor, as a tensor of `batch` equal shares.
Tensor take_rows(const Tensor& from, const RowMap& rows, std::int64_t batch, DType dtype) {
  const auto share = batch > 0 ? static_cast<std::int64_t>(rows.size()) / batch : 0;
  Tensor part(dtype, {batch, share, from.shape()[2], from.shape()[3]});
  part.for_each([&](auto b, auto j, auto h, auto c) {
    const auto [batch_of, row] = rows[static_cast<std::size_t>(b * share + j)];
    part.set(b, j, h, c, from.at(batch_of, row, h, c));
  });
  return part;
}

/// Calls body(batch, row in the part, batch and row in the whole).
template <typename Body>
void each_row(const RowMap& rows, std::int64_t batch, const Body& body) {
  const auto share = batch > 0 ? static_cast<std::int64_t>(rows.size()) / batch : 0;
  for (std::int64_t i = 0; i < share * batch; ++i) {
    const auto [whole_batch, whole_row] = rows[static_cast<std::size_t>(i)];
    body(i / share, i % share, whole_batch, whole_row);
  }
}

Part part_of(const Problem& whole, const Inputs& inputs, const std::vector<Window>& windows) {
  Part part{whole, inputs, rows_of(whole, windows, &Window::queries),
            rows_of(whole, windows, &Window::keys)};
  part.problem.windows = windows;
  const std::int64_t batch = whole.batch;
  part.inputs.query = take_rows(inputs.query, part.query_rows, batch, whole.dtype);
  part.inputs.dout = take_rows(inputs.dout, part.query_rows, batch, whole.dtype);
  part.inputs.key = take_rows(inputs.key, part.key_rows, batch, whole.dtype);
  part.inputs.value = take_rows(inputs.value, part.key_rows, batch, whole.dtype);
  if (inputs.dlse) {
    part.inputs.dlse =
        Tensor(inputs.dlse->dtype(), {batch, whole.num_heads, part.problem.query_rows(), 1});
    each_row(part.query_rows, batch, [&](auto b, auto j, auto whole_b, auto p) {
      for (std::int64_t h = 0; h < whole.num_heads; ++h) {
        part.inputs.dlse->set(b, h, j, 0, inputs.dlse->at(whole_b, h, p));
      }
    });
  }
  part.inputs.key_mask.clear();
  if (whole.has_key_mask) {
    for (const auto& [b, row] : part.key_rows) {
      part.inputs.key_mask.push_back(
          inputs.key_mask[static_cast<std::size_t>(b * whole.seqlen + row)]);
    }
  }
  return part;
}

/// `count` ranges that follow one another and cover every sequence; the same for all batch
/// elements.
std::vector<std::vector<Range>> draw_partition(const Problem& whole, int count) {
  const std::vector<Sequence> sequences = sequences_of(whole);
  std::vector<std::vector<Range>> ranges(static_cast<std::size_t>(count));
  for (std::size_t s = 0; s < sequences.size(); ++s) {
    if (s > 0 && whole.cu_seqlens.empty()) {
      for (auto& part : ranges) {
        part.push_back(part.front());
      }
      continue;
    }
    std::vector<std::int64_t> cuts = {0, sequences[s].length};
    for (int i = 1; i < count; ++i) {
      cuts.push_back(*rc::gen::inRange<std::int64_t>(0, sequences[s].length + 1));
    }
    std::sort(cuts.begin(), cuts.end());
    for (std::size_t i = 0; i < ranges.size(); ++i) {
      ranges[i].push_back({cuts[i], cuts[i + 1]});
    }
  }
  return ranges;
}

std::vector<Window> windows_of(const std::vector<Range>& queries, const std::vector<Range>& keys) {
  std::vector<Window> windows;
  for (std::size_t s = 0; s < queries.size(); ++s) {
    windows.push_back({queries[s], keys[s]});
  }
  return windows;
}

std::vector<Range> whole_ranges(const Problem& whole) {
  std::vector<Range> ranges;
  for (const Sequence& sequence : sequences_of(whole)) {
    ranges.push_back({0, sequence.length});
  }
  return ranges;
}

Problem with_lse_merge(Problem problem) {
  problem.merge = Merge::kLse;
  return problem;
}

DType unrounded(DType dtype) { return dtype == DType::kFloat64 ? dtype : DType::kFloat32; }

/// The whole's results, put together from every (query window, key window) by `merge` and
/// `merge_backward`.
Results composed(const Problem& whole, const Inputs& inputs, const std::string& backend) {
  const auto queries = draw_partition(whole, *rc::gen::inRange(1, 4));
  const auto keys = draw_partition(whole, *rc::gen::inRange(1, 5));
  const DType sums = unrounded(whole.dtype);
  const auto zeros = [&](const Tensor& like) {
    Tensor tensor(DType::kFloat64, like.shape());
    tensor.fill(0.0);
    return tensor;
  };
  Results total{zeros(inputs.query),
                Tensor(DType::kFloat64, {whole.batch, whole.num_heads, whole.seqlen, 1}),
                zeros(inputs.query), zeros(inputs.key), zeros(inputs.value)};
  total.lse.fill(0.0);
  for (const std::vector<Range>& query_ranges : queries) {
    std::vector<Part> parts;
    std::vector<Results> results;
    std::vector<Partial> partials;
    std::vector<PartialGradient> gradients;
    for (const std::vector<Range>& key_ranges : keys) {
      parts.push_back(part_of(whole, inputs, windows_of(query_ranges, key_ranges)));
      results.push_back(
          run(parts.back().problem, parts.back().inputs, {.backend = backend, .unrounded = true}));
    }
    std::vector<Tensor> douts;
    std::vector<Tensor> dlses;
    for (const Results& result : results) {
      partials.push_back({result.out.view(), result.lse.rows()});
      douts.emplace_back(sums, result.out.shape());
      dlses.emplace_back(sums, result.lse.shape());
    }
    for (std::size_t i = 0; i < douts.size(); ++i) {
      gradients.push_back({douts[i].view(), dlses[i].rows()});
    }
    const Part& first = parts.front();
    Tensor out(whole.dtype, results.front().out.shape());
    Tensor lse(sums, results.front().lse.shape());
    merge(partials, out.view(), lse.rows());
    merge_backward(partials, std::as_const(first.inputs.dout).view(),
                   first.inputs.dlse ? std::as_const(*first.inputs.dlse).rows() : ConstRowView{},
                   gradients);
    each_row(first.query_rows, whole.batch, [&](auto b, auto j, auto whole_b, auto p) {
      for (std::int64_t h = 0; h < whole.num_heads; ++h) {
        total.lse.set(whole_b, h, p, 0, lse.at(b, h, j));
        for (std::int64_t c = 0; c < whole.head_dim; ++c) {
          total.out.set(whole_b, p, h, c, out.at(b, j, h, c));
        }
      }
    });
    for (std::size_t i = 0; i < parts.size(); ++i) {
      Part& part = parts[i];
      part.inputs.dout = douts[i];
      part.inputs.dlse = dlses[i];
      const Results got = run(part.problem, part.inputs, {.backend = backend, .unrounded = true});
      const auto add = [&](Tensor& to, const Tensor& from, const RowMap& rows) {
        each_row(rows, whole.batch, [&](auto b, auto j, auto whole_b, auto p) {
          for (std::int64_t h = 0; h < to.shape()[2]; ++h) {
            for (std::int64_t c = 0; c < whole.head_dim; ++c) {
              to.set(whole_b, p, h, c, to.at(whole_b, p, h, c) + from.at(b, j, h, c));
            }
          }
        });
      };
      add(total.dquery, got.dquery, part.query_rows);
      add(total.dkey, got.dkey, part.key_rows);
      add(total.dvalue, got.dvalue, part.key_rows);
    }
  }
  return total;
}

TEST(Windows, AllWindowsTogetherAreTheWholeInDouble) {
  check_property("windows, reference", 150, {.dtype = DType::kFloat64, .max_seqlen = 40},
                 [](const RandomCase& drawn) {
                   Problem whole = with_lse_merge(drawn.problem);
                   whole.lse_grad = true;
                   return difference(composed(whole, drawn.inputs, "reference"),
                                     run(whole, drawn.inputs, {.backend = "reference"}), 1e-10);
                 });
}

TEST(Windows, AllWindowsTogetherKeepTheRule) {
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    check_property("windows, cpu", 150, {.dtype = dtype}, [](const RandomCase& drawn) {
      Problem whole = with_lse_merge(drawn.problem);
      whole.lse_grad = true;
      return rule_violation(whole, drawn.inputs, composed(whole, drawn.inputs, "cpu"), kDraws);
    });
  }
}

/// Windows that start inside a tile, a class, a segment, and sequences of many tiles.
TEST(Windows, LongSequencesKeepTheRule) {
  check_property(
      "windows, cpu, longer", 40, {.dtype = DType::kFloat32, .max_seqlen = 400, .max_head_dim = 70},
      [](const RandomCase& drawn) {
        Problem whole = with_lse_merge(drawn.problem);
        whole.lse_grad = true;
        return rule_violation(whole, drawn.inputs, composed(whole, drawn.inputs, "cpu"), kDraws);
      });
}

/// Rows of every query window with all keys against the same rows of the whole, bit for bit; with
/// detached weights too.
std::string query_windows_differ(const RandomCase& drawn, const std::string& backend) {
  const Problem whole = with_lse_merge(drawn.problem);
  const Results expected = run(whole, drawn.inputs, {.backend = backend});
  for (const std::vector<Range>& ranges : draw_partition(whole, 3)) {
    const Part part = part_of(whole, drawn.inputs, windows_of(ranges, whole_ranges(whole)));
    const Results got = run(part.problem, part.inputs, {.backend = backend});
    Results rows = got;
    each_row(part.query_rows, whole.batch, [&](auto b, auto j, auto whole_b, auto p) {
      for (std::int64_t h = 0; h < whole.num_heads; ++h) {
        rows.lse.set(b, h, j, 0, expected.lse.at(whole_b, h, p));
        for (std::int64_t c = 0; c < whole.head_dim; ++c) {
          rows.out.set(b, j, h, c, expected.out.at(whole_b, p, h, c));
          rows.dquery.set(b, j, h, c, expected.dquery.at(whole_b, p, h, c));
        }
      }
    });
    for (const Tensor Results::* tensor : {&Results::out, &Results::lse, &Results::dquery}) {
      const std::string text = bit_difference(got.*tensor, rows.*tensor);
      if (!text.empty()) {
        return text;
      }
    }
  }
  return "";
}

TEST(Windows, QueryWindowsHaveTheBitsOfTheWhole) {
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    check_property("query windows, cpu", 150, {.dtype = dtype},
                   [](const RandomCase& drawn) { return query_windows_differ(drawn, "cpu"); });
    check_property("query windows, cpu, longer", 30,
                   {.dtype = dtype, .max_seqlen = 400, .max_head_dim = 70},
                   [](const RandomCase& drawn) { return query_windows_differ(drawn, "cpu"); });
  }
  check_property("query windows, reference", 50, {.dtype = DType::kFloat64, .max_seqlen = 40},
                 [](const RandomCase& drawn) { return query_windows_differ(drawn, "reference"); });
}

TEST(Windows, WithoutKeysRowsAreAbsent) {
  for (const char* backend : {"cpu", "reference"}) {
    Problem problem = paper_problem(100, 2, 8, {{16, 1}, {100, 3}});
    problem.tail = Tail::kPhantom;
    problem.windows = {{{10, 90}, {40, 40}}};
    const Results got = run(problem, make_inputs(problem), {.backend = backend});
    got.out.for_each(
        [&](auto i, auto j, auto h, auto c) { ASSERT_EQ(got.out.at(i, j, h, c), 0.0); });
    got.lse.for_each([&](auto i, auto h, auto j, auto) {
      ASSERT_EQ(got.lse.at(i, h, j), -std::numeric_limits<double>::infinity());
    });
    problem.windows = {{{10, 10}, {40, 70}}};  // no queries: keys have gradients, which are zero
    const Results none = run(problem, make_inputs(problem), {.backend = backend});
    none.dkey.for_each(
        [&](auto i, auto j, auto h, auto c) { ASSERT_EQ(none.dkey.at(i, j, h, c), 0.0); });
  }
}

TEST(Windows, DetachedWeightsNeedAllKeysInBackward) {
  Problem problem = paper_problem(100, 2, 8, {{16, 1}, {100, 3}});
  problem.lse_grad = false;
  problem.windows = {{{0, 100}, {0, 99}}};
  try {
    run(problem, make_inputs(problem));
    FAIL();
  } catch (const Unsupported& error) {
    EXPECT_STREQ(error.what(),
                 "dilated_attention: lse_grad: expected true for gradients of windows that hold a "
                 "part of the keys, got false (detached merge weights need every branch's result "
                 "over all keys)");
  }
}

TEST(Windows, SpansAndSlotsEqualTheDefinition) {
  for (std::int64_t n = 1; n <= 24; ++n) {
    for (const std::int64_t w : {1, 2, 3, 5, 8, 30}) {
      for (const std::int64_t r : {1, 2, 3, 4, 7}) {
        const BranchGeometry geometry(n, w, r);
        for (std::int64_t begin = 0; begin <= n; ++begin) {
          for (std::int64_t end = begin; end <= n; ++end) {
            const std::int64_t bound =
                std::min(end - begin, (end - begin) / r + (end - begin) / w + 3);
            ASSERT_LE(geometry.compact_rows({begin, end}), bound) << n << " " << w << " " << r;
            for (std::int64_t o = 0; o < r; ++o) {
              std::set<std::int64_t> rows;
              for (std::int64_t s = 0; s < geometry.num_segments(); ++s) {
                const RowSpan span = geometry.span(s, o, {begin, end}, 100);
                for (std::int64_t i = span.first; i < span.last; ++i) {
                  rows.insert(span.row(i));
                  const std::int64_t slot = geometry.slot(s, i) - geometry.first_slot(begin);
                  ASSERT_TRUE(slot >= 0 && slot < geometry.compact_rows({begin, end}));
                }
              }
              std::set<std::int64_t> expected;
              for (std::int64_t p = begin; p < end; ++p) {
                if (geometry.covers(p, o)) {
                  expected.insert(100 + p - begin);
                }
              }
              ASSERT_EQ(rows, expected) << n << " " << w << " " << r << " " << o;
            }
          }
        }
      }
    }
  }
}

TEST(Windows, PairsOfAllWindowsSumToTheWhole) {
  check_property("pairs", 200, {.dtype = DType::kFloat32}, [](const RandomCase& drawn) {
    const Problem whole = with_lse_merge(drawn.problem);
    std::vector<std::int64_t> sum(whole.branches.size(), 0);
    const auto keys = draw_partition(whole, 3);
    for (const std::vector<Range>& queries : draw_partition(whole, 3)) {
      for (const std::vector<Range>& range : keys) {
        Problem part = whole;
        part.windows = windows_of(queries, range);
        const auto counts = count_pairs(part);
        for (std::size_t b = 0; b < sum.size(); ++b) {
          sum[b] += counts[b];
        }
      }
    }
    return std::string(sum == count_pairs(whole) ? "" : "the counts of the windows do not add up");
  });
}

}  // namespace
}  // namespace dilated::testing
