// Google Benchmark over Problem -> Plan -> forward / backward: the core without torch, on its own
// threads. Counter `FLOP` is useful work per second (semantics §10): 4 head_dim pairs forward, 2.5
// times that backward.
#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "dilated/attention.h"
#include "dilated/options.h"
#include "dilated/parallel_for.h"
#include "dilated/plan.h"

#include <benchmark/benchmark.h>

namespace {

struct Row {
  std::string name;
  dilated::Options options;
  dilated::Shapes shapes;
};

Row row(std::string name, std::string preset, std::vector<std::int64_t> segments,
        std::vector<std::int64_t> dilations, std::int64_t seqlen, std::int64_t num_heads,
        std::int64_t head_dim, bool is_causal) {
  Row result;
  result.name = std::move(name);
  result.options.preset = std::move(preset);
  result.options.segments = std::move(segments);
  result.options.dilations = std::move(dilations);
  result.options.is_causal = is_causal;
  result.shapes.seqlen = seqlen;
  result.shapes.num_heads = num_heads;
  result.shapes.num_kv_heads = num_heads;
  result.shapes.head_dim = head_dim;
  return result;
}

// The rows of `dilated bench` that take seconds, and one short enough to see the cost of a call.
std::vector<Row> rows() {
  const std::vector<std::int64_t> paper_segments{2048, 4096, 8192, 16384, 32768};
  const std::vector<std::int64_t> paper_dilations{1, 2, 4, 6, 12};
  const std::vector<std::int64_t> gigapath_segments{1024, 5792, 32768, 185363, 1048576};
  const std::vector<std::int64_t> gigapath_dilations{1, 2, 4, 8, 16};
  return {
      row("short", "longnet", {32, 128}, {1, 4}, 128, 4, 32, true),
      row("paper_d64_full", "longnet", paper_segments, paper_dilations, 32768, 12, 64, false),
      row("paper_d64_causal", "longnet", paper_segments, paper_dilations, 32768, 12, 64, true),
      row("gigapath_d48", "torchscale", gigapath_segments, gigapath_dilations, 10001, 16, 48,
          false),
      row("gigapath_d24", "torchscale", gigapath_segments, gigapath_dilations, 10001, 16, 24,
          false),
  };
}

// Contiguous row-major float32 array of normal values.
template <std::size_t kRank>
class Array {
 public:
  explicit Array(std::array<std::int64_t, kRank> shape, unsigned seed = 0) : shape_(shape) {
    std::int64_t size = 1;
    for (std::size_t i = kRank; i-- > 0;) {
      strides_[i] = size;
      size *= shape[i];
    }
    std::mt19937 generator(seed);
    std::normal_distribution<float> normal;
    values_.resize(static_cast<std::size_t>(size));
    for (float& value : values_) {
      value = normal(generator);
    }
  }

  template <typename Void>
  dilated::StridedView<Void, kRank> view() {
    return {values_.data(), dilated::DType::kFloat32, shape_, strides_};
  }

 private:
  std::vector<float> values_;
  std::array<std::int64_t, kRank> shape_;
  std::array<std::int64_t, kRank> strides_{};
};

void run(benchmark::State& state, const Row& row, dilated::Pass pass) {
  const dilated::Plan plan = dilated::make_plan(dilated::make_problem(row.options, row.shapes));
  const dilated::Shapes& s = row.shapes;
  const std::array<std::int64_t, 4> shape{s.batch, s.seqlen, s.num_heads, s.head_dim};
  const std::array<std::int64_t, 3> lse_shape{s.batch, s.num_heads, s.seqlen};
  Array<4> query(shape, 1), key(shape, 2), value(shape, 3), dout(shape, 4), out(shape);
  Array<3> lse(lse_shape), lse_residual(lse_shape);
  Array<4> branch_out({s.batch, s.num_heads, plan.branch_rows(), s.head_dim});
  Array<4> branch_lse({s.batch, s.num_heads, plan.branch_rows(), 2});

  dilated::ForwardTensors forward;
  forward.query = query.view<const void>();
  forward.key = key.view<const void>();
  forward.value = value.view<const void>();
  forward.out = out.view<void>();
  forward.lse = lse.view<void>();
  forward.lse_residual = lse_residual.view<void>();
  // As in torch's binding: branch results are written only when a backward pass will read them.
  if (pass == dilated::Pass::kBackward && plan.needs_branch_outputs()) {
    forward.branch_out = branch_out.view<void>();
    forward.branch_lse = branch_lse.view<void>();
  }
  // 64-byte alignment is the core's rule for memory that the caller brings.
  const auto bytes =
      static_cast<std::size_t>(std::max(plan.workspace_bytes(dilated::Pass::kForward),
                                        plan.workspace_bytes(dilated::Pass::kBackward)));
  std::vector<std::byte> memory(bytes + 64);
  void* aligned = memory.data();
  std::size_t space = memory.size();
  std::align(64, bytes, aligned, space);
  const dilated::Context context{.workspace = {static_cast<std::byte*>(aligned), bytes}};
  dilated::forward(plan, forward, context);

  Array<4> dquery(shape), dkey(shape), dvalue(shape);
  dilated::BackwardTensors backward;
  backward.dout = dout.view<const void>();
  backward.query = forward.query;
  backward.key = forward.key;
  backward.value = forward.value;
  backward.out = out.view<const void>();
  backward.lse = lse.view<const void>();
  backward.lse_residual = lse_residual.view<const void>();
  if (plan.needs_branch_outputs()) {
    backward.branch_out = branch_out.view<const void>();
    backward.branch_lse = branch_lse.view<const void>();
  }
  backward.dquery = dquery.view<void>();
  backward.dkey = dkey.view<void>();
  backward.dvalue = dvalue.view<void>();

  for (auto _ : state) {
    if (pass == dilated::Pass::kForward) {
      dilated::forward(plan, forward, context);
    } else {
      dilated::backward(plan, backward, context);
    }
    benchmark::ClobberMemory();
  }
  const std::vector<std::int64_t> pairs = dilated::count_pairs(plan.problem());
  const double flop =
      4.0 * static_cast<double>(s.head_dim) *
      static_cast<double>(std::accumulate(pairs.begin(), pairs.end(), std::int64_t{0})) *
      (pass == dilated::Pass::kForward ? 1.0 : 2.5);
  state.counters["FLOP"] = benchmark::Counter(flop, benchmark::Counter::kIsIterationInvariantRate);
  state.counters["workspace_MiB"] = static_cast<double>(bytes) / 1048576.0;
  state.SetLabel(std::string(plan.backend_name()));
}

}  // namespace

int main(int argc, char** argv) {
  for (const Row& row : rows()) {
    for (const dilated::Pass pass : {dilated::Pass::kForward, dilated::Pass::kBackward}) {
      const std::string name =
          row.name + (pass == dilated::Pass::kForward ? "/forward" : "/backward");
      benchmark::RegisterBenchmark(name.c_str(),
                                   [row, pass](benchmark::State& state) { run(state, row, pass); })
          ->UseRealTime()
          ->Unit(benchmark::kMillisecond);
    }
  }
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) {
    return 1;
  }
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
  return 0;
}
