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
    std::vector<std::thread> workers;
    workers.reserve(static_cast<std::size_t>(threads));
    int started = 1;  // thread 0 is the caller's
    try {
      while (started < threads) {
        workers.emplace_back(body, started);
        ++started;
      }
    } catch (const std::system_error&) {  // no more threads to be had: the caller runs the rest
      body(started++);
    }
    body(0);
    for (; started < threads; ++started) {
      body(started);
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
