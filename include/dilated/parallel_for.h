// How work is spread over threads: the caller brings its own pool, or takes the core's default.
// Results never depend on it: every item writes its own outputs, in one fixed order.
#pragma once

#include <cstdint>
#include <functional>

namespace dilated {

/// Runs `body(begin, end, thread)` over disjoint ranges that cover [0, items).
class ParallelFor {
 public:
  using Body = std::function<void(std::int64_t begin, std::int64_t end, int thread)>;

  virtual ~ParallelFor() = default;
  /// Upper bound of concurrently used thread numbers: 0 <= thread < num_threads().
  virtual int num_threads() const = 0;
  /// Blocks until all items are done. Rethrows the first exception of a body.
  virtual void run(std::int64_t items, const Body& body) const = 0;
};

/// Threads started for one call and joined at its end; as many as the hardware has.
const ParallelFor& default_parallel_for();

}  // namespace dilated
