// M13 and R1: the same bits for two runs, for any number of threads, and from many host
// threads that share one Plan. Meant for the thread sanitizer too.
#include <algorithm>
#include <thread>

#include <gtest/gtest.h>

#include "src/hand_out.h"
#include "tests/support/random_problem.h"
#include "tests/support/threads.h"

namespace dilated {
namespace {

using testing::bit_difference;
using testing::FixedThreads;
using testing::Inputs;
using testing::make_inputs;
using testing::Results;

struct Subject {
  Problem problem;
  std::string backend;
};

/// Full and causal, every dtype and merge, grouped queries, packed, dropout.
std::vector<Subject> subjects() {
  std::vector<Subject> result;
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    for (const Merge merge : {Merge::kLse, Merge::kSum, Merge::kMean}) {
      Problem problem = testing::paper_problem(400, 4, 24, {{64, 1}, {200, 2}, {400, 4}});
      problem.num_kv_heads = 2;
      problem.dtype = dtype;
      problem.merge = merge;
      problem.is_causal = merge == Merge::kSum;
      problem.lse_grad = merge != Merge::kLse || dtype == DType::kFloat32;
      problem.dropout_p = merge == Merge::kMean ? 0.2 : 0.0;
      problem.tail = Tail::kPhantom;
      result.push_back({problem, "cpu"});
    }
  }
  Problem packed = testing::paper_problem(300, 3, 40, {{64, 1}, {200, 3}});
  packed.cu_seqlens = {0, 5, 5, 170, 300};
  result.push_back({packed, "cpu"});
  packed.seqlen = 60;
  packed.cu_seqlens = {0, 5, 5, 60};
  packed.dtype = DType::kFloat64;
  result.push_back({packed, "reference"});
  return result;
}

/// Work items get shorter with more threads; on one thread they exceed what a kernel takes at once.
Subject long_items() {
  Problem problem = testing::paper_problem(512, 32, 256, {{512, 1}});
  std::fill(problem.branches[0].offsets.begin() + 1, problem.branches[0].offsets.end(), -1);
  return {problem, "cpu"};
}

TEST(Determinism, M13TheSameBitsTwiceAndOnAnyNumberOfThreads) {
  std::vector<Subject> all = subjects();
  all.push_back(long_items());
  for (const Subject& subject : all) {
    SCOPED_TRACE(subject.backend + "\n" + to_string(subject.problem));
    const Inputs inputs = make_inputs(subject.problem, {.amplitude = 1.0, .with_dlse = true});
    const FixedThreads one(1);
    const Results expected = testing::run(subject.problem, inputs, {subject.backend, &one});
    EXPECT_EQ(
        bit_difference(testing::run(subject.problem, inputs, {subject.backend, &one}), expected),
        "");
    EXPECT_EQ(bit_difference(testing::run(subject.problem, inputs, {subject.backend}), expected),
              "");
    for (const int threads : {2, 3, 8}) {
      const FixedThreads many(threads);
      EXPECT_EQ(
          bit_difference(testing::run(subject.problem, inputs, {subject.backend, &many}), expected),
          "")
          << threads;
    }
  }
}

TEST(Determinism, OnePlanIsSharedByManyHostThreads) {  // R1, R18
  for (const Subject& subject : subjects()) {
    const Plan plan = make_plan(subject.problem, subject.backend);
    const Inputs inputs = make_inputs(subject.problem, {.amplitude = 1.0, .with_dlse = true});
    const FixedThreads one(1);
    const Results expected = testing::run(plan, inputs, {subject.backend, &one});
    std::vector<std::string> differences(8, "not run");
    {
      std::vector<std::thread> hosts;
      for (std::string& text : differences) {
        hosts.emplace_back([&] {
          text = "";
          for (int call = 0; call < testing::effort(5) && text.empty(); ++call) {
            text = bit_difference(testing::run(plan, inputs, {subject.backend, &one}), expected);
          }
        });
      }
      for (std::thread& host : hosts) {
        host.join();
      }
    }
    for (const std::string& text : differences) {
      EXPECT_EQ(text, "") << to_string(subject.problem);
    }
  }
}

TEST(Determinism, AnExceptionOfAWorkerReachesTheCaller) {
  const ParallelFor& threads = default_parallel_for();
  EXPECT_THROW(
      hand_out(threads, 100,
               [](std::int64_t, std::int64_t, int) { throw std::runtime_error("worker"); }),
      std::runtime_error);
  std::vector<int> visits(1000, 0);
  hand_out(threads, 1000, [&](std::int64_t begin, std::int64_t end, int thread) {
    EXPECT_LT(thread, threads.num_threads());
    for (std::int64_t i = begin; i < end; ++i) {
      ++visits[static_cast<std::size_t>(i)];
    }
  });
  EXPECT_EQ(visits, std::vector<int>(1000, 1));
  hand_out(threads, 0, [](std::int64_t, std::int64_t, int) { FAIL(); });
}

}  // namespace
}  // namespace dilated
