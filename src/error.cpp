// The one message template.
#include "dilated/error.h"

#include <fmt/format.h>

namespace dilated {

std::string message_of(const Violation& violation) {
  return fmt::format("{}: {}: expected {}, got {}{}", violation.op, violation.argument,
                     violation.expected, violation.got,
                     violation.hint.empty() ? "" : fmt::format(" ({})", violation.hint));
}

}  // namespace dilated
