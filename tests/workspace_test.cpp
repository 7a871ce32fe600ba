// Requirements 2, 16, 18: the caller's workspace of the stated size is all the memory a call needs.
// This program counts every operator new; guard bytes and poison of the workspace are in
// testing::run and act in every test.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <new>
#include <span>
#include <string>
#include <utility>

#include <gtest/gtest.h>

#include "dilated/error.h"

#include "tests/support/call.h"
#include "tests/support/threads.h"

namespace {
std::atomic<std::int64_t> allocated_bytes = 0;

void* counted(std::size_t size, std::size_t alignment) {
  allocated_bytes += static_cast<std::int64_t>(size);
  const std::size_t rounded = (size + alignment - 1) / alignment * alignment;
  void* const memory = std::aligned_alloc(alignment, rounded == 0 ? alignment : rounded);
  if (memory == nullptr) {
    throw std::bad_alloc();
  }
  return memory;
}

// Not inlined: GCC would see free() meet a pointer from operator new and warn.
[[gnu::noinline]] void released(void* memory) { std::free(memory); }
}  // namespace

void* operator new(std::size_t size) { return counted(size, alignof(std::max_align_t)); }
void* operator new[](std::size_t size) { return counted(size, alignof(std::max_align_t)); }
void* operator new(std::size_t size, std::align_val_t alignment) {
  return counted(size, std::size_t(alignment));
}
void* operator new[](std::size_t size, std::align_val_t alignment) {
  return counted(size, std::size_t(alignment));
}
// std::stable_sort asks here for its buffer; AddressSanitizer has one of its own if we have none.
void* operator new(std::size_t size, const std::nothrow_t&) noexcept {
  return counted(size, alignof(std::max_align_t));
}
void operator delete(void* memory) noexcept { released(memory); }
void operator delete[](void* memory) noexcept { released(memory); }
void operator delete(void* memory, std::size_t) noexcept { released(memory); }
void operator delete[](void* memory, std::size_t) noexcept { released(memory); }
void operator delete(void* memory, std::align_val_t) noexcept { released(memory); }
void operator delete[](void* memory, std::align_val_t) noexcept { released(memory); }
void operator delete(void* memory, std::size_t, std::align_val_t) noexcept { released(memory); }
void operator delete[](void* memory, std::size_t, std::align_val_t) noexcept { released(memory); }

namespace dilated {
namespace {

using testing::Inputs;
using testing::make_inputs;
using testing::Tensor;

struct alignas(64) Line {
  std::byte bytes[64];
};

/// Everything one forward and backward of a problem needs, allocated beforehand.
struct Prepared {
  explicit Prepared(const Problem& problem)
      : plan(make_plan(problem, "cpu")),
        inputs(make_inputs(problem, {.amplitude = 1.0})),
        out(problem.dtype, inputs.query.shape()),
        lse(DType::kFloat32, {problem.batch, problem.num_heads, problem.seqlen, 1}),
        branch_out(DType::kFloat32,
                   {problem.batch, problem.num_heads, plan.branch_rows(), problem.head_dim}),
        branch_lse(DType::kFloat32, {problem.batch, problem.num_heads, plan.branch_rows(), 2}),
        dquery(out),
        dkey(problem.dtype, inputs.key.shape()),
        dvalue(dkey) {
    const std::int64_t bytes =
        std::max(plan.workspace_bytes(Pass::kForward), plan.workspace_bytes(Pass::kBackward));
    lines.resize(static_cast<std::size_t>(bytes / 64 + 1));
  }

  std::span<std::byte> workspace(Pass pass) {
    return {reinterpret_cast<std::byte*>(lines.data()),
            static_cast<std::size_t>(plan.workspace_bytes(pass))};
  }

  ForwardTensors forward_tensors() {
    ForwardTensors tensors{std::as_const(inputs.query).view(),
                           std::as_const(inputs.key).view(),
                           std::as_const(inputs.value).view(),
                           {},
                           out.view(),
                           lse.rows(),
                           {},
                           {},
                           {}};
    if (plan.needs_branch_outputs()) {
      tensors.branch_out = branch_out.view();
      tensors.branch_lse = branch_lse.view();
    }
    return tensors;
  }

  BackwardTensors backward_tensors() {
    BackwardTensors tensors;
    tensors.dout = std::as_const(inputs.dout).view();
    tensors.query = std::as_const(inputs.query).view();
    tensors.key = std::as_const(inputs.key).view();
    tensors.value = std::as_const(inputs.value).view();
    tensors.out = std::as_const(out).view();
    tensors.lse = std::as_const(lse).rows();
    if (plan.needs_branch_outputs()) {
      tensors.branch_out = std::as_const(branch_out).view();
      tensors.branch_lse = std::as_const(branch_lse).view();
    }
    tensors.dquery = dquery.view();
    tensors.dkey = dkey.view();
    tensors.dvalue = dvalue.view();
    return tensors;
  }

  Plan plan;
  Inputs inputs;
  Tensor out, lse, branch_out, branch_lse, dquery, dkey, dvalue;
  std::vector<Line> lines;
};

Problem problem_of(std::int64_t seqlen, DType dtype, Merge merge) {
  Problem problem = testing::paper_problem(seqlen, 2, 48, {{64, 1}, {seqlen, 4}});
  problem.dtype = dtype;
  problem.merge = merge;
  problem.device.units = 1;
  return problem;
}

std::int64_t bytes_of_one_call(std::int64_t seqlen, DType dtype, Merge merge) {
  const testing::FixedThreads one(1);
  Prepared prepared(problem_of(seqlen, dtype, merge));
  const ForwardTensors forward_tensors = prepared.forward_tensors();
  const BackwardTensors backward_tensors = prepared.backward_tensors();
  const std::int64_t before = allocated_bytes;
  forward(prepared.plan, forward_tensors, {&one, prepared.workspace(Pass::kForward)});
  backward(prepared.plan, backward_tensors, {&one, prepared.workspace(Pass::kBackward)});
  return allocated_bytes - before;
}

TEST(Workspace, CallsAllocateNothingThatGrows) {
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    for (const Merge merge : {Merge::kLse, Merge::kSum}) {
      EXPECT_LE(bytes_of_one_call(1024, dtype, merge),
                1024);  // the order of branches, a std::function
      EXPECT_EQ(bytes_of_one_call(1024, dtype, merge), bytes_of_one_call(128, dtype, merge));
    }
  }
}

TEST(Workspace, WithoutOneTheCoreAllocatesTheStatedSize) {
  const testing::FixedThreads one(1);
  Prepared prepared(problem_of(256, DType::kBFloat16, Merge::kLse));
  for (const Pass pass : {Pass::kForward, Pass::kBackward}) {
    const auto call = [&](std::span<std::byte> workspace) {
      const std::int64_t before = allocated_bytes;
      if (pass == Pass::kForward) {
        forward(prepared.plan, prepared.forward_tensors(), {&one, workspace});
      } else {
        backward(prepared.plan, prepared.backward_tensors(), {&one, workspace});
      }
      return allocated_bytes - before;
    };
    const std::int64_t given = call(prepared.workspace(pass));
    EXPECT_EQ(call({}) - given, prepared.plan.workspace_bytes(pass));
  }
}

TEST(Workspace, GrowsAtMostLinearlyByThreadsAndLength) {  // peak(2n) / peak(n) <= 2.02
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    for (const Pass pass : {Pass::kForward, Pass::kBackward}) {
      const auto bytes = [&](std::int64_t seqlen, int threads) {
        Problem problem = problem_of(seqlen, dtype, Merge::kSum);
        problem.device.units = threads;
        return make_plan(problem, "cpu").workspace_bytes(pass);
      };
      for (std::int64_t n = 4096; n <= std::int64_t{1} << 20; n *= 2) {
        EXPECT_LE(static_cast<double>(bytes(2 * n, 4)), 2.02 * static_cast<double>(bytes(n, 4)));
      }
      for (int threads = 1; threads < 64; ++threads) {  // work items get shorter, never longer
        EXPECT_LE(bytes(1 << 18, threads + 1) * threads, bytes(1 << 18, threads) * (threads + 1));
      }
    }
  }
}

TEST(Workspace, TooSmallOrMisalignedRaisesAndWritesNothing) {
  const testing::FixedThreads one(1);
  Prepared prepared(problem_of(64, DType::kFloat32, Merge::kLse));
  const std::span<std::byte> whole = prepared.workspace(Pass::kForward);
  const auto message = [&](std::span<std::byte> workspace) {
    try {
      forward(prepared.plan, prepared.forward_tensors(), {&one, workspace});
    } catch (const InvalidProblem& error) {
      EXPECT_EQ(error.argument(), "workspace");
      return std::string(error.what());
    }
    return std::string("no error");
  };
  const std::string size = std::to_string(whole.size());
  const std::string less = std::to_string(whole.size() - 1);
  EXPECT_EQ(message(whole.first(whole.size() - 1)), "forward: workspace: expected at least " +
                                                        size + " bytes, got " + less +
                                                        " (plan.workspace_bytes() tells the size)");
  prepared.lines.resize(prepared.lines.size() + 1);
  std::byte* const shifted = reinterpret_cast<std::byte*>(prepared.lines.data()) + 8;
  EXPECT_TRUE(message({shifted, whole.size()})
                  .starts_with("forward: workspace: expected 64-byte alignment, got 0x"));
  EXPECT_TRUE(std::isnan(prepared.out.at(0, 0, 0, 0)));
  EXPECT_EQ(message(prepared.workspace(Pass::kForward)), "no error");
}

}  // namespace
}  // namespace dilated
