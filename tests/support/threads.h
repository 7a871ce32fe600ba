// A ParallelFor for tests: a fixed number of threads.
#pragma once

#include <thread>
#include <vector>

#include "dilated/parallel_for.h"

namespace dilated::testing {

class FixedThreads final : public ParallelFor {
 public:
  explicit FixedThreads(int threads) : threads_(threads) {}

  int num_threads() const override { return threads_; }

  void run(int threads, const Body& body) const override {
    std::vector<std::thread> workers;
    for (int thread = 1; thread < threads; ++thread) {
      workers.emplace_back(body, thread);
    }
    body(0);
    for (std::thread& worker : workers) {
      worker.join();
    }
  }

 private:
  int threads_;
};

}  // namespace dilated::testing
