// Threads that the caller lends: a pool of its own, or the core's default. How work is handed out
// to them is the core's business (src/hand_out.h), and results never depend on it.
#pragma once

#include <functional>

namespace dilated {

class ParallelFor {
 public:
  using Body = std::function<void(int thread)>;

  virtual ~ParallelFor() = default;
  /// Upper bound of concurrently used threads, at least 1.
  virtual int num_threads() const = 0;
  /// Calls body(t) once for every t in [0, threads), threads <= num_threads(), side by side where
  /// it can, and returns when all have returned. `body` does not throw.
  virtual void run(int threads, const Body& body) const = 0;
};

/// Threads started for one call and joined at its end; as many as the hardware has.
const ParallelFor& default_parallel_for();

}  // namespace dilated
