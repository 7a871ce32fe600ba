// ParallelFor on torch's threads. Items are handed out from a counter, so causal rows of unequal
// cost balance.
#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>

#include "bindings/torch/stable_abi.h"

namespace dilated::binding {

TorchParallelFor::TorchParallelFor()
    : num_threads_(std::max(1, static_cast<int>(torch::stable::get_num_threads()))) {}

void TorchParallelFor::run(std::int64_t items, const Body& body) const {
  const std::int64_t threads = std::min<std::int64_t>(items, num_threads_);
  if (threads <= 1) {
    if (items > 0) {
      body(0, items, 0);
    }
    return;
  }
  // 16 hand-outs per thread: less than 1/16 of a share is left over at the end.
  const std::int64_t step = std::max<std::int64_t>(1, items / (threads * 16));
  std::atomic<std::int64_t> next{0};
  std::mutex mutex;
  std::exception_ptr first_error;
  // One outer item per thread: `begin` is unique among concurrent calls and serves as thread
  // number. Inside another parallel region torch runs all of them in one call; the first then takes
  // every item.
  torch::stable::parallel_for(0, threads, 1, [&](std::int64_t begin, std::int64_t) {
    try {
      for (std::int64_t i = next.fetch_add(step); i < items; i = next.fetch_add(step)) {
        body(i, std::min(i + step, items), static_cast<int>(begin));
      }
    } catch (
        ...) {  // torch's C interface would drop the message: carried over it and rethrown below
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

}  // namespace dilated::binding
