// What a back end decided for a problem: tiles, order of work, scratch. Immutable and printable, a
// pure function of the Problem: it can be made and tested without the device.
#pragma once

#include <cstdint>
#include <string>

namespace dilated {

enum class Pass { kForward, kBackward };

/// Base of every back end's own decision; held by the Plan.
class Decision {
 public:
  virtual ~Decision() = default;
  /// Bytes of scratch memory of one call. The formulas stand in docs/architecture.md.
  virtual std::int64_t workspace_bytes(Pass pass) const = 0;
  /// One line per decided value.
  virtual std::string to_string() const = 0;

 protected:
  Decision() = default;
  Decision(const Decision&) = default;
  Decision& operator=(const Decision&) = default;
};

}  // namespace dilated
