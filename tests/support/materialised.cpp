// Literal loops over positions; the only function shared with the library is the dropout draw.
#include "tests/support/materialised.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <numeric>
#include <random>

#include <fmt/format.h>

#include "src/dropout.h"

namespace dilated::testing {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

template <typename Real>
struct Matrix {
  std::size_t rows = 0;
  std::size_t columns = 0;
  std::vector<Real> items;

  Matrix(std::size_t r, std::size_t c) : rows(r), columns(c), items(r * c, Real(0)) {}
  Real& at(std::size_t r, std::size_t c) { return items[r * columns + c]; }
  Real at(std::size_t r, std::size_t c) const { return items[r * columns + c]; }
};

template <typename Real>
Matrix<Real> product(const Matrix<Real>& a, const Matrix<Real>& b) {  // a b
  Matrix<Real> c(a.rows, b.columns);
  for (std::size_t i = 0; i < a.rows; ++i) {
    for (std::size_t k = 0; k < a.columns; ++k) {
      const Real factor = a.at(i, k);
      for (std::size_t j = 0; j < b.columns && factor != Real(0); ++j) {
        c.at(i, j) += factor * b.at(k, j);
      }
    }
  }
  return c;
}

template <typename Real>
Matrix<Real> transposed(const Matrix<Real>& a) {
  Matrix<Real> t(a.columns, a.rows);
  for (std::size_t i = 0; i < a.rows; ++i) {
    for (std::size_t j = 0; j < a.columns; ++j) {
      t.at(j, i) = a.at(i, j);
    }
  }
  return t;
}

/// One segment of one branch of one head: its rows attend to one another.
template <typename Real>
struct Block {
  std::size_t branch;
  std::vector<std::int64_t> positions;  // in the sequence
  Matrix<Real> query, key, value;
  Matrix<Real> probability, dropped, keep;  // P, P m/(1-p), m/(1-p)
  Matrix<Real> out;                         // O_b
  std::vector<Real> lse;                    // l_b
};

template <typename Real>
class Attention {
 public:
  Attention(const Problem& problem, const Inputs& inputs, DType dtype)
      : problem_(problem), inputs_(inputs), dtype_(dtype) {
    scale_ = static_cast<Real>(
        problem.scale.value_or(1.0 / std::sqrt(static_cast<double>(problem.head_dim))));
    const auto like = [](const Tensor& tensor) {
      Tensor zeros(DType::kFloat64, tensor.shape());
      zeros.fill(0.0);
      return zeros;
    };
    results_ = {like(inputs.query),
                Tensor(DType::kFloat64, {problem.batch, problem.num_heads, problem.seqlen, 1}),
                like(inputs.query), like(inputs.key), like(inputs.value)};
    results_.lse.fill(-kInfinity);
  }

  Results results() {
    std::uint64_t sequence = 0;
    if (problem_.cu_seqlens.empty()) {
      for (std::int64_t batch = 0; batch < problem_.batch; ++batch) {
        one_sequence(sequence++, batch, 0, problem_.seqlen);
      }
    }
    for (std::size_t s = 1; s < problem_.cu_seqlens.size(); ++s) {
      one_sequence(sequence++, 0, problem_.cu_seqlens[s - 1],
                   problem_.cu_seqlens[s] - problem_.cu_seqlens[s - 1]);
    }
    for (const NamedResult& result : kResults) {
      if (result.name != "lse") {
        Tensor& tensor = results_.*result.member;
        tensor.for_each([&](auto i, auto j, auto k, auto c) {
          tensor.set(i, j, k, c, round_to(dtype_, tensor.at(i, j, k, c)));
        });
      }
    }
    return std::move(results_);
  }

 private:
  Real rounded(Real value) const {
    return static_cast<Real>(round_to(dtype_, static_cast<double>(value)));
  }
  void round(Matrix<Real>& matrix) const {
    for (Real& item : matrix.items) {
      item = rounded(item);
    }
  }

  void one_sequence(std::uint64_t sequence, std::int64_t batch, std::int64_t start,
                    std::int64_t length) {
    const std::int64_t n = problem_.has_seqused ? inputs_.seqused[sequence] : length;
    for (std::int64_t head = 0; head < problem_.num_heads && n > 0; ++head) {
      std::vector<Block<Real>> blocks;
      for (std::size_t b = 0; b < problem_.branches.size(); ++b) {
        const Branch& branch = problem_.branches[b];
        const std::int64_t w = branch.segment < n ? branch.segment : n;
        for (std::int64_t base = 0; base < n; base += w) {
          std::vector<std::int64_t> positions;
          for (std::int64_t p = base; p < n && p < base + w; ++p) {
            if ((p - base) % branch.dilation == branch.offsets[static_cast<std::size_t>(head)]) {
              positions.push_back(p);
            }
          }
          if (!positions.empty()) {
            blocks.push_back(block(sequence, batch, start, head, b, w, positions));
          }
        }
      }
      merge_and_differentiate(batch, start, n, head, blocks);
    }
  }

  std::int64_t kv(std::int64_t head) const {
    return head / (problem_.num_heads / problem_.num_kv_heads);
  }

  Matrix<Real> rows(const Tensor& tensor, std::int64_t batch, std::int64_t start, std::int64_t head,
                    const std::vector<std::int64_t>& positions) const {
    Matrix<Real> matrix(positions.size(), static_cast<std::size_t>(problem_.head_dim));
    for (std::size_t i = 0; i < positions.size(); ++i) {
      for (std::size_t c = 0; c < matrix.columns; ++c) {
        matrix.at(i, c) = static_cast<Real>(
            tensor.at(batch, start + positions[i], head, static_cast<std::int64_t>(c)));
      }
    }
    return matrix;
  }

  bool is_masked(std::int64_t batch, std::int64_t row) const {
    return problem_.has_key_mask &&
           inputs_.key_mask[static_cast<std::size_t>(batch * problem_.seqlen + row)] == 0;
  }

  Block<Real> block(std::uint64_t sequence, std::int64_t batch, std::int64_t start,
                    std::int64_t head, std::size_t b, std::int64_t w,
                    const std::vector<std::int64_t>& positions) const {
    const std::size_t m = positions.size();
    Block<Real> result{b,
                       positions,
                       rows(inputs_.query, batch, start, head, positions),
                       rows(inputs_.key, batch, start, kv(head), positions),
                       rows(inputs_.value, batch, start, kv(head), positions),
                       Matrix<Real>(m, m),
                       Matrix<Real>(m, m),
                       Matrix<Real>(m, m),
                       Matrix<Real>(m, 0),
                       {}};
    const std::int64_t r = problem_.branches[b].dilation;
    const std::int64_t slots = w / r + (w % r != 0 ? 1 : 0);
    const bool phantom = problem_.tail == Tail::kPhantom && !problem_.is_causal;
    const auto z = phantom ? static_cast<Real>(slots - static_cast<std::int64_t>(m)) : Real(0);
    Matrix<Real> scores = product(result.query, transposed(result.key));
    for (Real& score : scores.items) {
      score = rounded(scale_ * score);
    }
    const std::uint64_t key = dropout_key(
        static_cast<std::uint64_t>(inputs_.dropout_state[0]),
        static_cast<std::uint64_t>(inputs_.dropout_state[1]),
        (sequence * static_cast<std::uint64_t>(problem_.total_heads > 0 ? problem_.total_heads
                                                                        : problem_.num_heads) +
         static_cast<std::uint64_t>(problem_.head_offset + head)) *
                problem_.branches.size() +
            b);
    for (std::size_t i = 0; i < m; ++i) {
      const auto sees = [&](std::size_t j) {
        return !(problem_.is_causal && j > i) && !is_masked(batch, start + positions[j]);
      };
      Real top = z > Real(0) ? Real(0) : static_cast<Real>(-kInfinity);
      for (std::size_t j = 0; j < m; ++j) {
        top = sees(j) && scores.at(i, j) > top ? scores.at(i, j) : top;
      }
      Real sum = z > Real(0) ? z * std::exp(-top) : Real(0);
      for (std::size_t j = 0; j < m; ++j) {
        sum += sees(j) ? std::exp(scores.at(i, j) - top) : Real(0);
      }
      result.lse.push_back(sum > Real(0) ? top + std::log(sum) : static_cast<Real>(-kInfinity));
      for (std::size_t j = 0; j < m; ++j) {
        if (!sees(j)) {
          continue;
        }
        const Real probability = rounded(std::exp(scores.at(i, j) - top) / sum);
        const bool keep =
            problem_.dropout_p == 0.0 || dropout_draw(key, static_cast<std::uint64_t>(positions[i]),
                                                      static_cast<std::uint64_t>(positions[j])) <
                                             dropout_threshold(problem_.dropout_p);
        result.keep.at(i, j) = keep ? static_cast<Real>(1.0 / (1.0 - problem_.dropout_p)) : Real(0);
        result.probability.at(i, j) = probability;
        result.dropped.at(i, j) = rounded(probability * result.keep.at(i, j));
      }
    }
    result.out = product(result.dropped, result.value);
    round(result.out);
    return result;
  }

  void merge_and_differentiate(std::int64_t batch, std::int64_t start, std::int64_t n,
                               std::int64_t head, const std::vector<Block<Real>>& blocks) {
    const auto size = static_cast<std::size_t>(n);
    std::vector<Real> top(size, static_cast<Real>(-kInfinity));
    std::vector<Real> sum(size, Real(0));
    std::vector<Real> covering(size, Real(0));
    each_row(blocks, [&](const Block<Real>& block, std::size_t i, std::size_t p) {
      top[p] = std::max(top[p], block.lse[i]);
      covering[p] += Real(1);
    });
    each_row(blocks, [&](const Block<Real>& block, std::size_t i, std::size_t p) {
      sum[p] += is_absent(block.lse[i]) ? Real(0) : std::exp(block.lse[i] - top[p]);
    });
    std::vector<Real> lse(size);
    for (std::size_t p = 0; p < size; ++p) {
      lse[p] = is_absent(top[p]) ? top[p] : top[p] + std::log(sum[p]);
      results_.lse.set(batch, head, start + static_cast<std::int64_t>(p), 0,
                       static_cast<double>(lse[p]));
    }
    const auto share = [&](Real branch_lse, std::size_t p) {
      return is_absent(branch_lse) ? Real(0) : std::exp(branch_lse - lse[p]);
    };
    const auto weight = [&](Real branch_lse, std::size_t p) {
      switch (problem_.merge) {
        case Merge::kLse:
          return share(branch_lse, p);
        case Merge::kSum:
          return Real(1);
        case Merge::kMean:
          return Real(1) / covering[p];
      }
      return Real(0);
    };
    const auto out_scale = static_cast<Real>(problem_.out_scale);
    const auto channels = static_cast<std::size_t>(problem_.head_dim);
    Matrix<Real> out(size, channels);
    each_row(blocks, [&](const Block<Real>& block, std::size_t i, std::size_t p) {
      for (std::size_t c = 0; c < channels; ++c) {
        out.at(p, c) += out_scale * weight(block.lse[i], p) * block.out.at(i, c);
      }
    });
    add(results_.out, batch, start, head, out);

    for (const Block<Real>& block : blocks) {
      Matrix<Real> upstream = rows(inputs_.dout, batch, start, head, block.positions);  // of O_b
      std::vector<Real> constant(block.positions.size());  // what is subtracted from dP
      for (std::size_t i = 0; i < block.positions.size(); ++i) {
        const auto p = static_cast<std::size_t>(block.positions[i]);
        const Real w = weight(block.lse[i], p);
        Real branch_delta = 0;  // D_b
        Real merged_delta = 0;  // D
        for (std::size_t c = 0; c < channels; ++c) {
          const Real g = out_scale * upstream.at(i, c);
          branch_delta += g * block.out.at(i, c);
          merged_delta += upstream.at(i, c) * rounded(out.at(p, c));
          upstream.at(i, c) = rounded(w * g);
        }
        Real dlse = problem_.merge == Merge::kLse && problem_.lse_grad
                        ? w * (branch_delta - merged_delta)
                        : Real(0);
        if (inputs_.dlse) {
          dlse += share(block.lse[i], p) *
                  static_cast<Real>(inputs_.dlse->at(batch, head, start + block.positions[i]));
        }
        constant[i] = w * branch_delta - dlse;
      }
      Matrix<Real> dscores = product(upstream, transposed(block.value));
      round(dscores);
      for (std::size_t i = 0; i < dscores.rows; ++i) {
        for (std::size_t j = 0; j < dscores.columns; ++j) {
          const Real p = block.probability.at(i, j);
          dscores.at(i, j) =
              p == Real(0)
                  ? Real(0)
                  : rounded(scale_ * p * (block.keep.at(i, j) * dscores.at(i, j) - constant[i]));
        }
      }
      scatter(results_.dquery, batch, start, head, block.positions, product(dscores, block.key));
      scatter(results_.dkey, batch, start, kv(head), block.positions,
              product(transposed(dscores), block.query));
      scatter(results_.dvalue, batch, start, kv(head), block.positions,
              product(transposed(block.dropped), upstream));
    }
  }

  static bool is_absent(Real lse) { return lse == static_cast<Real>(-kInfinity); }

  template <typename Body>
  static void each_row(const std::vector<Block<Real>>& blocks, const Body& body) {
    for (const Block<Real>& block : blocks) {
      for (std::size_t i = 0; i < block.positions.size(); ++i) {
        body(block, i, static_cast<std::size_t>(block.positions[i]));
      }
    }
  }

  void add(Tensor& to, std::int64_t batch, std::int64_t start, std::int64_t head,
           const Matrix<Real>& from) const {
    std::vector<std::int64_t> positions;
    for (std::size_t p = 0; p < from.rows; ++p) {
      positions.push_back(static_cast<std::int64_t>(p));
    }
    scatter(to, batch, start, head, positions, from);
  }

  void scatter(Tensor& to, std::int64_t batch, std::int64_t start, std::int64_t head,
               const std::vector<std::int64_t>& positions, const Matrix<Real>& from) const {
    for (std::size_t i = 0; i < positions.size(); ++i) {
      for (std::size_t c = 0; c < from.columns; ++c) {
        const auto channel = static_cast<std::int64_t>(c);
        const double before = to.at(batch, start + positions[i], head, channel);
        to.set(batch, start + positions[i], head, channel,
               before + static_cast<double>(rounded(from.at(i, c))));
      }
    }
  }

  const Problem& problem_;
  const Inputs& inputs_;
  DType dtype_;
  Real scale_;
  Results results_;
};

}  // namespace

Results materialised(const Problem& problem, const Inputs& inputs, DType dtype) {
  return dtype == DType::kFloat64 ? Attention<double>(problem, inputs, dtype).results()
                                  : Attention<float>(problem, inputs, dtype).results();
}

namespace {

using Errors = std::array<double, kResults.size()>;

constexpr std::size_t kLse = 1;
static_assert(kResults[kLse].name == "lse");

Errors errors_of(const Results& got, const Results& exact) {
  Errors errors{};
  for (std::size_t i = 0; i < errors.size(); ++i) {
    errors[i] = max_error(got.*kResults[i].member, exact.*kResults[i].member);
  }
  return errors;
}

/// Large scores are rounded themselves, at 16,384 by 1e-3: there sixteen units in the last place.
double lse_floor_of(const Results& exact) {
  double largest = 0.0;
  exact.lse.for_each([&](auto b, auto h, auto p, auto) {
    const double lse = std::abs(exact.lse.at(b, h, p));
    largest = std::isfinite(lse) ? std::max(largest, lse) : largest;
  });
  return std::max(1e-3, largest * 0x1p-19);
}

/// Of the plain implementation. Its lse is float32, as the operator's is, whatever the dtype.
Errors plain_errors(const Problem& problem, const Inputs& inputs, const Results& exact) {
  Errors errors = errors_of(materialised(problem, inputs, problem.dtype), exact);
  if (problem.dtype != DType::kFloat32 && problem.dtype != DType::kFloat64) {
    errors[kLse] = max_error(materialised(problem, inputs, DType::kFloat32).lse, exact.lse);
  }
  return errors;
}

std::string violation(const Errors& errors, const Errors& plain, double lse_floor) {
  for (std::size_t i = 0; i < errors.size(); ++i) {
    const double allowed = i == kLse ? std::max(lse_floor, 2.0 * plain[i]) : 2.0 * plain[i] + 1e-5;
    if (!(errors[i] <= allowed)) {
      return fmt::format("{}: error {:.3g}, allowed {:.3g} (plain implementation {:.3g})",
                         kResults[i].name, errors[i], allowed, plain[i]);
    }
  }
  return "";
}

}  // namespace

Inputs other_inputs(const Problem& problem, const Inputs& inputs, int draw) {
  const auto seed = static_cast<std::uint64_t>(5000 + 5 * draw);
  Inputs other = make_inputs(problem, {.amplitude = 1.5, .first_seed = seed});
  other.dlse = inputs.dlse;
  other.key_mask = inputs.key_mask;
  other.seqused = inputs.seqused;
  other.dropout_state = inputs.dropout_state;
  return other;
}

Inputs reordered(const Inputs& inputs, int draw) {
  Inputs result = inputs;
  std::vector<std::int64_t> channels(static_cast<std::size_t>(inputs.query.shape()[3]));
  std::iota(channels.begin(), channels.end(), 0);
  std::shuffle(channels.begin(), channels.end(), std::mt19937(static_cast<unsigned>(draw)));
  for (Tensor Inputs::* member : {&Inputs::query, &Inputs::key, &Inputs::value, &Inputs::dout}) {
    const Tensor& from = inputs.*member;
    from.for_each([&](auto i, auto j, auto h, auto c) {
      (result.*member).set(i, j, h, c, from.at(i, j, h, channels[static_cast<std::size_t>(c)]));
    });
  }
  return result;
}

std::string rule_violation(const Problem& problem, const Inputs& inputs, const Results& got,
                           int draws, const Redraw& redraw) {
  const Results exact = reference(problem, inputs);
  const Errors errors = errors_of(got, exact);
  const double lse_floor = lse_floor_of(exact);
  Errors plain = plain_errors(problem, inputs, exact);
  std::string text = violation(errors, plain, lse_floor);
  for (int draw = 1; draw < draws && !text.empty(); ++draw) {
    const Inputs other = redraw ? redraw(draw) : other_inputs(problem, inputs, draw);
    const Errors more = plain_errors(problem, other, reference(problem, other));
    for (std::size_t i = 0; i < plain.size(); ++i) {
      plain[i] = std::max(plain[i], more[i]);
    }
    text = violation(errors, plain, lse_floor);
  }
  return text;
}

}  // namespace dilated::testing
