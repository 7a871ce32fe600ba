// The default ParallelFor: threads that live for one call. No pool means no process-wide state.
#include "dilated/parallel_for.h"

#include <algorithm>
#include <system_error>
#include <thread>
#include <vector>

namespace dilated {
namespace {

class ThreadsPerCall final : public ParallelFor {
 public:
  int num_threads() const override {
    return static_cast<int>(std::max(1U, std::thread::hardware_concurrency()));
  }

  void run(int threads, const Body& body) const override {
    // Where the system has no more threads, the caller's runs what is left.
    std::vector<std::thread> workers;
    workers.reserve(static_cast<std::size_t>(threads));
    int next = 1;
    try {
      for (; next < threads; ++next) {
        workers.emplace_back(body, next);
      }
    } catch (const std::system_error&) {
    }
    body(0);
    for (; next < threads; ++next) {
      body(next);
    }
    for (std::thread& worker : workers) {
      worker.join();
    }
  }
};

}  // namespace

const ParallelFor& default_parallel_for() {
  static const ThreadsPerCall kThreads;
  return kThreads;
}

}  // namespace dilated
