// A ParallelFor for tests: a fixed number of threads that take small chunks in whatever order they
// come.
#pragma once

#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

#include "dilated/parallel_for.h"

namespace dilated::testing {

class FixedThreads final : public ParallelFor {
 public:
  explicit FixedThreads(int threads) : threads_(threads) {}

  int num_threads() const override { return threads_; }

  void run(std::int64_t items, const Body& body) const override {
    std::atomic<std::int64_t> next = 0;
    const auto work = [&](int thread) {
      for (std::int64_t begin = next.fetch_add(2); begin < items; begin = next.fetch_add(2)) {
        body(begin, std::min(begin + 2, items), thread);
      }
    };
    std::vector<std::jthread> workers;
    for (int thread = 1; thread < threads_; ++thread) {
      workers.emplace_back(work, thread);
    }
    work(0);
  }

 private:
  int threads_;
};

}  // namespace dilated::testing
