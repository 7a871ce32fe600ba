// The ordered table of back ends: what each can run, how much scratch it needs, and its two entry
// points.
#pragma once

#include <array>
#include <memory>
#include <string>
#include <string_view>

#include "dilated/attention.h"
#include "dilated/plan.h"

namespace dilated {

struct Backend {
  std::string_view name;
  /// Empty: usable here. Else why not (not built, no such hardware).
  std::string (*unavailable)();
  /// What runs, for example the SIMD target.
  std::string (*description)();
  /// Empty: supports the problem. Else the reason.
  std::string (*rejects)(const Problem&);
  /// Everything that is decided before tensors are seen; needs no device.
  std::shared_ptr<const Decision> (*decide)(const Plan&);
  /// Called with checked views, `context.parallel_for` set and a `context.workspace` that is large
  /// enough and 64-byte aligned. Never called without query heads, or without query and key rows.
  void (*forward)(const Plan&, const ForwardTensors&, const Context&);
  void (*backward)(const Plan&, const BackwardTensors&, const Context&);
};

// One per folder in src/kernels.
const Backend& cuda_backend();
const Backend& cpu_backend();
const Backend& reference_backend();

/// In the order in which they are asked.
inline std::array<const Backend*, 3> backend_table() {
  return {&cuda_backend(), &cpu_backend(), &reference_backend()};
}

/// The back end that runs `problem`. `forced` empty: DILATED_BACKEND if set, else the first that
/// supports it.
const Backend& select_backend(const Problem& problem, std::string_view forced);

}  // namespace dilated
