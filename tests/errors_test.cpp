// R15: a table of every violation, with kind, argument and the whole message compared.
// R7, X2: forced back ends that cannot run are errors, never fallbacks.
#include <cstdlib>
#include <functional>
#include <limits>

#include <gtest/gtest.h>

#include "dilated/backend.h"
#include "dilated/error.h"
#include "dilated/options.h"

#include "tests/support/call.h"

namespace dilated {
namespace {

using testing::Tensor;

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr double kInfinity = std::numeric_limits<double>::infinity();

struct Violated {
  std::string message;  // with the kind in front
  std::string argument;
};

Violated violated_by(const std::function<void()>& call) {
  try {
    call();
  } catch (const InvalidProblem& error) {
    return {std::string("InvalidProblem ") + error.what(), error.argument()};
  } catch (const Unsupported& error) {
    return {std::string("Unsupported ") + error.what(), error.argument()};
  }
  return {"no error", ""};
}

/// `message` is what stands between "<kind> <op>: <argument>: " and the end.
struct ErrorRow {
  std::string kind;
  std::string op;
  std::string argument;
  std::string message;
  std::function<void()> call;
};

void expect_rows(const std::vector<ErrorRow>& rows) {
  for (const ErrorRow& row : rows) {
    const Violated got = violated_by(row.call);
    EXPECT_EQ(got.message, row.kind + " " + row.op + ": " + row.argument + ": " + row.message);
    EXPECT_EQ(got.argument, row.argument);
  }
}

ErrorRow invalid(std::string argument, std::string message,
                 const std::function<void(Problem&)>& change) {
  return {"InvalidProblem", "dilated_attention", std::move(argument), std::move(message), [change] {
            Problem problem = testing::paper_problem(16, 4, 8, {{4, 1}, {8, 2}});
            change(problem);
            validate(problem);
          }};
}

TEST(Errors, EveryRuleOfAProblem) {
  const std::string long_hint = " (a segment longer than the sequence acts as one)";
  const std::string out_hint = " (-1 leaves the head out)";
  expect_rows({
      invalid("batch", "expected >= 0, got -1", [](Problem& p) { p.batch = -1; }),
      invalid("seqlen", "expected >= 0, got -5", [](Problem& p) { p.seqlen = -5; }),
      invalid("num_heads", "expected >= 0, got -1", [](Problem& p) { p.num_heads = -1; }),
      invalid("num_kv_heads", "expected >= 0, got -2", [](Problem& p) { p.num_kv_heads = -2; }),
      invalid("head_dim", "expected >= 1, got 0", [](Problem& p) { p.head_dim = 0; }),
      invalid("num_kv_heads",
              "expected a divisor of num_heads = 4, got 3 (query head h reads key/value head h / "
              "(num_heads / "
              "num_kv_heads))",
              [](Problem& p) { p.num_kv_heads = 3; }),
      invalid("num_kv_heads",
              "expected a divisor of num_heads = 4, got 0 (query head h reads key/value head h / "
              "(num_heads / "
              "num_kv_heads))",
              [](Problem& p) { p.num_kv_heads = 0; }),
      invalid("query",
              "expected at most 2^50 bytes, got 2.36e+21 (no memory could hold the tensors)",
              [](Problem& p) {
                p.seqlen = std::int64_t{1} << 61;
                p.batch = 8;
              }),
      invalid("query",
              "expected at most 2^50 bytes, got 2.95e+20 (no memory could hold the tensors)",
              [](Problem& p) {  // an empty dimension does not excuse another one
                p.seqlen = std::int64_t{1} << 61;
                p.batch = 0;
              }),
      invalid("head_offset",
              "expected 0 <= head_offset <= total_heads - num_heads = 4, got 5 (the call's heads "
              "are [head_offset, head_offset + num_heads) of total_heads)",
              [](Problem& p) {
                p.total_heads = 8;
                p.head_offset = 5;
              }),
      invalid("device.units",
              "expected 0 <= units <= 2^20 threads or multiprocessors, got -1 (0: as many as the "
              "hardware has)",
              [](Problem& p) { p.device.units = -1; }),
      invalid("device.units",
              "expected 0 <= units <= 2^20 threads or multiprocessors, got 4294967296 (0: as many "
              "as the hardware has)",
              [](Problem& p) { p.device.units = std::int64_t{1} << 32; }),
      invalid("alignment", "expected 0 (unknown) or a power of two, got 12",
              [](Problem& p) { p.alignment = 12; }),
      invalid("windows", "expected one per sequence, 1, got 2",
              [](Problem& p) { p.windows = {{{0, 4}, {0, 4}}, {{0, 4}, {0, 4}}}; }),
      invalid("windows[0].queries", "expected 0 <= begin <= end <= sequence length 16, got [3, 17)",
              [](Problem& p) { p.windows = {{{3, 17}, {0, 4}}}; }),
      invalid("windows[0].keys", "expected 0 <= begin <= end <= sequence length 16, got [5, 4)",
              [](Problem& p) { p.windows = {{{3, 7}, {5, 4}}}; }),
      invalid("windows[1]",
              "expected as many rows as windows[0], unless packed, got 3 queries and 4 keys",
              [](Problem& p) {
                p.batch = 2;
                p.windows = {{{3, 7}, {0, 4}}, {{3, 6}, {0, 4}}};
              }),
      {"Unsupported", "dilated_attention", "merge",
       "expected lse with windows, got sum (results of windows are merged by their log-sum-exps, "
       "which say nothing about the single branches)",
       [] {
         Problem problem = testing::paper_problem(16, 4, 8, {{4, 1}, {8, 2}});
         problem.merge = Merge::kSum;
         problem.windows = {{{0, 4}, {0, 4}}};
         validate(problem);
       }},
      invalid("segments", "expected at least one branch, got none",
              [](Problem& p) { p.branches.clear(); }),
      invalid("segments[1]", "expected 1 <= segment <= 2^40, got 0" + long_hint,
              [](Problem& p) { p.branches[1].segment = 0; }),
      invalid("segments[0]", "expected 1 <= segment <= 2^40, got 1099511627777" + long_hint,
              [](Problem& p) { p.branches[0].segment = (std::int64_t{1} << 40) + 1; }),
      invalid("dilations[1]", "expected 1 <= dilation <= 2^40, got 0",
              [](Problem& p) { p.branches[1].dilation = 0; }),
      invalid("dilations[1]", "expected 1 <= dilation <= 2^40, got -3",
              [](Problem& p) { p.branches[1].dilation = -3; }),
      invalid("offsets[1]", "expected one entry per query head, 4, got 3",
              [](Problem& p) { p.branches[1].offsets.pop_back(); }),
      invalid("offsets[1][2]", "expected < dilations[1] = 2, got 2" + out_hint,
              [](Problem& p) { p.branches[1].offsets[2] = 2; }),
      invalid("offsets[0][3]", "expected >= -1, got -2" + out_hint,
              [](Problem& p) { p.branches[0].offsets[3] = -2; }),
      invalid("query",
              "expected batch 1 with cu_seqlens, got 2 (packed tensors have shape (total, heads, "
              "head_dim))",
              [](Problem& p) {
                p.batch = 2;
                p.cu_seqlens = {0, 16};
              }),
      invalid("cu_seqlens[0]", "expected 0, got 1", [](Problem& p) { p.cu_seqlens = {1, 16}; }),
      invalid("cu_seqlens[2]",
              "expected >= cu_seqlens[1] = 9, got 8 (equal neighbours are an empty sequence)",
              [](Problem& p) { p.cu_seqlens = {0, 9, 8, 16}; }),
      invalid("cu_seqlens[2]", "expected the number of tokens, 16, got 15",
              [](Problem& p) { p.cu_seqlens = {0, 9, 15}; }),
      invalid("out_scale", "expected a finite number, got inf",
              [](Problem& p) { p.out_scale = kInfinity; }),
      invalid("scale", "expected a finite number, got nan", [](Problem& p) { p.scale = kNan; }),
      invalid("dropout_p", "expected 0 <= dropout_p <= 1, got 1.5",
              [](Problem& p) { p.dropout_p = 1.5; }),
      invalid("dropout_p", "expected 0 <= dropout_p <= 1, got -0.1",
              [](Problem& p) { p.dropout_p = -0.1; }),
      invalid("dropout_p", "expected 0 <= dropout_p <= 1, got nan",
              [](Problem& p) { p.dropout_p = kNan; }),
      invalid("lse_grad",
              "expected true with merge = sum, got false (only merge = lse has weights to detach)",
              [](Problem& p) {
                p.merge = Merge::kSum;
                p.lse_grad = false;
              }),
  });
}

struct OptionsAndShapes {
  Options options;
  Shapes shapes;
};

ErrorRow option(std::string argument, std::string message,
                const std::function<void(Options&, Shapes&)>& change,
                std::string kind = "InvalidProblem") {
  return {std::move(kind), "dilated_attention", std::move(argument), std::move(message), [change] {
            OptionsAndShapes given;
            given.options.segments = {4, 8};
            given.options.dilations = {1, 2};
            given.shapes.seqlen = 16;
            given.shapes.num_heads = 4;
            given.shapes.num_kv_heads = 4;
            given.shapes.head_dim = 8;
            change(given.options, given.shapes);
            make_problem(given.options, given.shapes);
          }};
}

TEST(Errors, EveryRuleOfTheOptions) {
  const auto fixed = [](const std::string& preset) {
    return " (preset '" + preset +
           "' fixes it; leave out preset, or override offsets, tail or lse_grad)";
  };
  expect_rows({
      option("segments", "expected at least one branch, got none",
             [](Options& o, Shapes&) {
               o.segments.clear();
               o.dilations.clear();
             }),
      option("dilations", "expected as many entries as segments, 2, got 1",
             [](Options& o, Shapes&) { o.dilations = {1}; }),
      option("dilations[0]", "expected 1 <= dilation <= 2^40, got 0",
             [](Options& o, Shapes&) { o.dilations[0] = 0; }),
      option(
          "segments[1]",
          "expected 1 <= segment <= 2^40, got 0 (a segment longer than the sequence acts as one)",
          [](Options& o, Shapes&) { o.segments[1] = 0; }),
      option("preset",
             "expected one of longnet, torchscale, head_groups, fork, fkodom, got LongNet",
             [](Options& o, Shapes&) { o.preset = "LongNet"; }),
      option("offsets", "expected one of paper, torchscale, branch, zero, got random",
             [](Options& o, Shapes&) { o.offsets = "random"; }),
      option("groups", "expected one of none, cumulative, literal, got some",
             [](Options& o, Shapes&) { o.groups = "some"; }),
      option("merge", "expected one of lse, sum, mean, got max",
             [](Options& o, Shapes&) { o.merge = "max"; }),
      option("tail", "expected one of mask, phantom, got zeros",
             [](Options& o, Shapes&) { o.tail = "zeros"; }),
      option("gqa_offset", "expected one of kv, q, got k",
             [](Options& o, Shapes&) { o.gqa_offset = "k"; }),
      option("offsets", "expected a builder's name or a table, got both",
             [](Options& o, Shapes&) {
               o.offsets = "paper";
               o.offset_table = std::vector<std::int64_t>(8, 0);
             }),
      option("offsets", "expected a table of 2 branches x 4 heads, got 7 entries",
             [](Options& o, Shapes&) { o.offset_table = std::vector<std::int64_t>(7, 0); }),
      option("gqa_offset",
             "expected no value together with a table of offsets, got q (a table is per query head "
             "already)",
             [](Options& o, Shapes&) {
               o.gqa_offset = "q";
               o.offset_table = std::vector<std::int64_t>(8, 0);
             }),
      option("merge", "expected no value together with preset, got lse" + fixed("longnet"),
             [](Options& o, Shapes&) {
               o.preset = "longnet";
               o.merge = "lse";
             }),
      option("out_scale", "expected no value together with preset, got 0.5" + fixed("fork"),
             [](Options& o, Shapes&) {
               o.preset = "fork";
               o.out_scale = 0.5;
             }),
      option("groups",
             "expected no value together with preset, got cumulative" + fixed("head_groups"),
             [](Options& o, Shapes&) {
               o.preset = "head_groups";
               o.groups = "cumulative";
             }),
      option("num_heads", "expected >= number of branches = 2 with preset 'fork', got 1",
             [](Options& o, Shapes& s) {
               o.preset = "fork";
               s.num_heads = s.num_kv_heads = 1;
             }),
      option("lse_grad",
             "expected true with merge = sum, got false (only merge = lse has weights to detach)",
             [](Options& o, Shapes&) {
               o.preset = "fork";
               o.lse_grad = false;
             }),
      option("num_kv_heads",
             "expected a divisor of num_heads = 4, got 3 (query head h reads key/value head h / "
             "(num_heads / "
             "num_kv_heads))",
             [](Options&, Shapes& s) { s.num_kv_heads = 3; }),
      option(
          "cu_seqlens",
          "expected none with preset 'fkodom', got 2 sequences (its column sums run over one "
          "sequence; call once "
          "per sequence)",
          [](Options& o, Shapes& s) {
            o.preset = "fkodom";
            s.cu_seqlens = {0, 4, 16};
          },
          "Unsupported"),
      option(
          "preset",
          "expected a dilation that divides its segment wherever a sequence is longer than the "
          "segment, got "
          "segments[1] = 9, dilations[1] = 2, sequence length 16 (torchscale shifts the rows of "
          "later segments "
          "there: leave out preset to compute the unshifted operator, or pass row_shift=True for "
          "weights trained "
          "that way)",
          [](Options& o, Shapes&) {
            o.preset = "torchscale";
            o.segments[1] = 9;
          },
          "Unsupported"),
  });
}

/// A call with correct views, some of which `change` then breaks.
struct Call {
  testing::Inputs inputs;
  Tensor out, lse, dquery, dkey, dvalue, branch_out, branch_lse;
  ForwardTensors forward_tensors;
  BackwardTensors backward_tensors;
};

ErrorRow view(std::string op, std::string argument, std::string message,
              const std::function<void(Problem&)>& change_problem,
              const std::function<void(Call&)>& change) {
  return {"InvalidProblem", op, std::move(argument), std::move(message),
          [op, change_problem, change] {
            Problem problem = testing::paper_problem(16, 4, 8, {{4, 1}, {8, 2}});
            problem.num_kv_heads = 2;
            change_problem(problem);
            const Plan plan = make_plan(problem, "cpu");
            Call call;
            call.inputs = testing::make_inputs(problem, {});
            const Tensor& q = call.inputs.query;
            const Tensor& k = call.inputs.key;
            call.out = Tensor(problem.dtype, q.shape());
            call.lse = Tensor(DType::kFloat32, {1, 4, 16, 1});
            call.dquery = call.out;
            call.dkey = Tensor(problem.dtype, k.shape());
            call.dvalue = call.dkey;
            call.branch_out = Tensor(DType::kFloat32, {1, 4, plan.branch_rows(), 8});
            call.branch_lse = Tensor(DType::kFloat32, {1, 4, plan.branch_rows(), 2});
            const Call& constant = call;
            call.forward_tensors = {constant.inputs.query.view(),
                                    constant.inputs.key.view(),
                                    constant.inputs.value.view(),
                                    call.inputs.masks(problem),
                                    call.out.view(),
                                    call.lse.rows(),
                                    {},
                                    {},
                                    {}};
            BackwardTensors& backward_tensors = call.backward_tensors;
            backward_tensors.dout = constant.inputs.dout.view();
            backward_tensors.query = constant.inputs.query.view();
            backward_tensors.key = constant.inputs.key.view();
            backward_tensors.value = constant.inputs.value.view();
            backward_tensors.out = constant.out.view();
            backward_tensors.lse = constant.lse.rows();
            backward_tensors.branch_out = constant.branch_out.view();
            backward_tensors.branch_lse = constant.branch_lse.view();
            backward_tensors.masks = call.inputs.masks(problem);
            backward_tensors.dquery = call.dquery.view();
            backward_tensors.dkey = call.dkey.view();
            backward_tensors.dvalue = call.dvalue.view();
            change(call);
            if (op == "forward") {
              forward(plan, call.forward_tensors);
            } else {
              backward(plan, call.backward_tensors);
            }
          }};
}

TEST(Errors, EveryViewThatDoesNotFitThePlan) {
  const auto same = [](Problem&) {};
  const auto sum = [](Problem& p) { p.merge = Merge::kSum; };
  expect_rows({
      view("forward", "query", "expected a tensor of shape (1, 16, 4, 8), got none", same,
           [](Call& c) { c.forward_tensors.query.data = nullptr; }),
      view("forward", "query", "expected shape (1, 16, 4, 8), got (1, 15, 4, 8)", same,
           [](Call& c) { c.forward_tensors.query.shape[1] = 15; }),
      view("forward", "key", "expected shape (1, 16, 2, 8), got (1, 16, 4, 8)", same,
           [](Call& c) { c.forward_tensors.key.shape[2] = 4; }),
      view("forward", "value", "expected dtype float32, got float64", same,
           [](Call& c) { c.forward_tensors.value.dtype = DType::kFloat64; }),
      view("forward", "out",
           "expected a contiguous last dimension, got stride 2 (call .contiguous())", same,
           [](Call& c) { c.forward_tensors.out.strides[3] = 2; }),
      view("forward", "lse", "expected shape (1, 4, 16), got (1, 16, 4)", same,
           [](Call& c) { c.forward_tensors.lse.shape = {1, 16, 4}; }),
      view(
          "forward", "key_mask", "expected a tensor of shape (1, 16), got none",
          [](Problem& p) { p.has_key_mask = true; },
          [](Call& c) { c.forward_tensors.masks.key_mask.data = nullptr; }),
      view("forward", "key_mask", "expected none, as the problem has no key mask, got a tensor",
           same, [](Call& c) { c.forward_tensors.masks.key_mask.data = &c; }),
      view(
          "forward", "seqused", "expected one length per sequence, got none",
          [](Problem& p) { p.has_seqused = true; },
          [](Call& c) { c.forward_tensors.masks.seqused = nullptr; }),
      view("forward", "seqused", "expected none, as the problem has no seqused, got lengths", same,
           [](Call& c) {
             static const std::int64_t kLength = 3;
             c.forward_tensors.masks.seqused = &kLength;
           }),
      view(
          "forward", "seqused[0]", "expected 0 <= length <= that of the sequence, 16, got 17",
          [](Problem& p) { p.has_seqused = true; },
          [](Call& c) {
            static const std::int64_t kLength = 17;
            c.forward_tensors.masks.seqused = &kLength;
          }),
      view(
          "forward", "dropout_state", "expected (seed, offset) with dropout_p > 0, got none",
          [](Problem& p) { p.dropout_p = 0.5; },
          [](Call& c) { c.forward_tensors.masks.dropout_state = nullptr; }),
      view("forward", "out",
           "expected elements that do not share memory, got an expanded or overlapping view (give "
           "it memory of its own)",
           same, [](Call& c) { c.forward_tensors.out.strides[1] = 0; }),
      view("forward", "out",
           "expected memory apart from query, got overlapping memory (outputs are written while "
           "inputs are read)",
           same, [](Call& c) { c.forward_tensors.out = c.inputs.query.view(); }),
      view("backward", "dkey",
           "expected memory apart from dvalue, got overlapping memory (outputs are written while "
           "inputs are read)",
           same, [](Call& c) { c.backward_tensors.dvalue = c.dkey.view(); }),
      view("forward", "branch_out", "expected shape (1, 4, 28, 8), got (1, 16, 4, 8)", same,
           [](Call& c) { c.forward_tensors.branch_out = c.out.view(); }),
      view("forward", "branch_lse", "expected a tensor of shape (1, 4, 28, 2), got none", sum,
           [](Call& c) { c.forward_tensors.branch_out = c.branch_out.view(); }),
      view("backward", "dout", "expected a tensor of shape (1, 16, 4, 8), got none", same,
           [](Call& c) { c.backward_tensors.dout.data = nullptr; }),
      view("backward", "dlse", "expected dtype float32, got float16", same,
           [](Call& c) {
             c.backward_tensors.dlse = c.backward_tensors.lse;
             c.backward_tensors.dlse.dtype = DType::kFloat16;
           }),
      view("backward", "branch_out", "expected a tensor of shape (1, 4, 28, 8), got none", sum,
           [](Call& c) { c.backward_tensors.branch_out = {}; }),
      view("backward", "dkey", "expected shape (1, 16, 2, 8), got (1, 16, 4, 8)", same,
           [](Call& c) { c.backward_tensors.dkey.shape[2] = 4; }),
      view("backward", "dvalue", "expected dtype float32, got bfloat16", same,
           [](Call& c) { c.backward_tensors.dvalue.dtype = DType::kBFloat16; }),
  });
}

TEST(Errors, PatternsHaveLimits) {
  const Problem problem = testing::paper_problem(16, 4, 8, {{4, 1}});
  Problem longer = problem;
  longer.seqlen = 4097;
  expect_rows({
      {"InvalidProblem", "attention_pattern", "head", "expected 0 <= head < num_heads = 4, got 4",
       [&] { attention_pattern(problem, 4); }},
      {"InvalidProblem", "attention_pattern", "seqlen",
       "expected <= 4096, neither packed nor windows, got 4097 (the table has seqlen^2 entries)",
       [&] { attention_pattern(longer, 0); }},
  });
}

/// Sets DILATED_BACKEND for one test.
class ForcedByEnvironment : public ::testing::Test {
 protected:
  void force(const char* name) { setenv("DILATED_BACKEND", name, 1); }
  void TearDown() override { unsetenv("DILATED_BACKEND"); }
};

TEST_F(ForcedByEnvironment, ABackendThatCannotRunIsAnError) {
  Problem doubles = testing::paper_problem(16, 4, 8, {{4, 1}});
  Problem halves = doubles;
  Problem wide = doubles;
  doubles.dtype = DType::kFloat64;
  halves.dtype = DType::kBFloat16;
  wide.head_dim = 257;
  Problem on_gpu = doubles;
  on_gpu.device.kind = Device::kCuda;
  on_gpu.dtype = DType::kBFloat16;
  const std::string expected = "expected a back end that can run this problem, got ";
  const std::string no_cuda = "this build contains no CUDA kernels";
  expect_rows({
      {"Unsupported", "dilated_attention", "backend",
       expected + "cpu (dtype float64 is left to the reference back end)",
       [&] { make_plan(doubles, "cpu"); }},
      {"Unsupported", "dilated_attention", "backend",
       expected + "cpu (head_dim 257 is not in 1..256)", [&] { make_plan(wide, "cpu"); }},
      {"Unsupported", "dilated_attention", "backend", expected + "cuda (" + no_cuda + ")",
       [&] { make_plan(halves, "cuda"); }},
      {"Unsupported", "dilated_attention", "backend",
       expected + "reference (dtype bfloat16 is not float32 or float64)",
       [&] { make_plan(halves, "reference"); }},
      {"InvalidProblem", "dilated_attention", "backend",
       "expected one of cuda, cpu, reference, got fast", [&] { make_plan(halves, "fast"); }},
      {"Unsupported", "dilated_attention", "backend",
       expected + "bfloat16 on cuda (cuda: " + no_cuda +
           "; cpu: tensors are not on the CPU; reference: tensors are not on the CPU)",
       [&] { make_plan(on_gpu); }},
  });
  force("fast");
  expect_rows({{"InvalidProblem", "dilated_attention", "DILATED_BACKEND",
                "expected one of cuda, cpu, reference, got fast", [&] { make_plan(halves); }},
               {"InvalidProblem", "dilated_attention", "DILATED_BACKEND",
                "expected one of cuda, cpu, reference, got fast", [&] { explain(halves); }}});
  force("reference");
  expect_rows({{"Unsupported", "dilated_attention", "DILATED_BACKEND",
                expected + "reference (dtype bfloat16 is not float32 or float64)",
                [&] { make_plan(halves); }}});
}

TEST_F(ForcedByEnvironment, TheForcedBackendRuns) {
  const Problem problem = testing::paper_problem(16, 4, 8, {{4, 1}});
  EXPECT_EQ(make_plan(problem).backend_name(), "cpu");
  EXPECT_EQ(make_plan(problem, "reference").backend_name(), "reference");
  force("reference");
  EXPECT_EQ(make_plan(problem).backend_name(), "reference");
  EXPECT_EQ(make_plan(problem, "cpu").backend_name(), "cpu");  // the argument wins
}

TEST(Backends, AreListedAndExplained) {
  std::vector<std::string> names;
  for (const BackendInfo& info : backends()) {
    names.push_back(info.name);
    EXPECT_FALSE(info.description.empty());
    EXPECT_EQ(info.available, info.name != "cuda");
  }
  EXPECT_EQ(names, (std::vector<std::string>{"cuda", "cpu", "reference"}));
  Problem problem = testing::paper_problem(16, 4, 8, {{4, 1}});
  const std::string cpu = backends()[1].description;
  EXPECT_EQ(explain(problem),
            "cuda      cannot run this: this build contains no CUDA kernels\n"
            "cpu       runs this: " +
                cpu +
                "\n"
                "reference could run this, cpu is preferred\n");
  problem.dtype = DType::kFloat64;
  EXPECT_EQ(explain(problem),
            "cuda      cannot run this: this build contains no CUDA kernels\n"
            "cpu       cannot run this: dtype float64 is left to the reference back end\n"
            "reference runs this: the definition as loops, double accumulation\n");
}

}  // namespace
}  // namespace dilated
