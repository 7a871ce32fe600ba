// The only place that divides work between threads.
#pragma once

#include <cstdint>
#include <functional>

#include "dilated/parallel_for.h"

namespace dilated {

/// Runs `body(begin, end, thread)` over disjoint ranges that cover [0, items), on at most
/// threads.num_threads() threads. Ranges are taken from a counter, so that items of unequal cost
/// balance. Rethrows the first exception of a body; what has not begun by then is left out.
void hand_out(const ParallelFor& threads, std::int64_t items,
              const std::function<void(std::int64_t begin, std::int64_t end, int thread)>& body);

}  // namespace dilated
