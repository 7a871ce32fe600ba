// The default ParallelFor: threads that live for one call. No pool means no process-wide state.
#include "dilated/parallel_for.h"

#include <algorithm>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace dilated {
namespace {

class ThreadsPerCall final : public ParallelFor {
 public:
  int num_threads() const override {
    return static_cast<int>(std::max(1U, std::thread::hardware_concurrency()));
  }

  void run(std::int64_t items, const Body& body) const override {
    const std::int64_t threads = std::min<std::int64_t>(items, num_threads());
    if (threads <= 1) {
      if (items > 0) {
        body(0, items, 0);
      }
      return;
    }
    std::mutex mutex;
    std::exception_ptr first_error;
    const auto share = [&](std::int64_t t) {
      try {
        body(items * t / threads, items * (t + 1) / threads, static_cast<int>(t));
      } catch (...) {  // carried to the caller's thread and rethrown there
        const std::lock_guard lock(mutex);
        if (!first_error) {
          first_error = std::current_exception();
        }
      }
    };
    {
      std::vector<std::jthread> workers;
      workers.reserve(static_cast<std::size_t>(threads - 1));
      for (std::int64_t t = 1; t < threads; ++t) {
        workers.emplace_back(share, t);
      }
      share(0);
    }  // joined here
    if (first_error) {
      std::rethrow_exception(first_error);
    }
  }
};

}  // namespace

const ParallelFor& default_parallel_for() {
  static const ThreadsPerCall kThreads;
  return kThreads;
}

}  // namespace dilated
