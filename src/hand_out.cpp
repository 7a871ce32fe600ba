// Ranges of work from a counter; the first exception is carried to the caller.
#include "src/hand_out.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>

namespace dilated {

void hand_out(const ParallelFor& threads, std::int64_t items,
              const std::function<void(std::int64_t begin, std::int64_t end, int thread)>& body) {
  const auto count = static_cast<int>(std::min<std::int64_t>(items, threads.num_threads()));
  if (count <= 1) {
    if (items > 0) {
      body(0, items, 0);
    }
    return;
  }
  // 16 takes per thread: less than 1/16 of a share is left over at the end.
  const std::int64_t step = std::max<std::int64_t>(1, items / (std::int64_t{count} * 16));
  std::atomic<std::int64_t> next{0};
  std::mutex mutex;
  std::exception_ptr first_error;
  threads.run(count, [&](int thread) {
    try {
      for (std::int64_t i = next.fetch_add(step); i < items; i = next.fetch_add(step)) {
        body(i, std::min(i + step, items), thread);
      }
    } catch (...) {  // carried to the caller's thread and rethrown there
      const std::lock_guard lock(mutex);
      if (!first_error) {
        first_error = std::current_exception();
      }
      next.store(items);
    }
  });
  if (first_error) {
    std::rethrow_exception(first_error);
  }
}

}  // namespace dilated
