// Typed errors with one message template: "op: argument: expected …, got … (hint)".
#pragma once

#include <stdexcept>
#include <string>
#include <utility>

namespace dilated {

/// Base of every error this library throws.
class Error : public std::runtime_error {
 public:
  Error(const std::string& message, std::string argument)
      : std::runtime_error(message), argument_(std::move(argument)) {}
  /// Name of the offending argument, as in the public API.
  const std::string& argument() const noexcept { return argument_; }

 private:
  std::string argument_;
};

/// An argument breaks a rule of the specification. `ValueError` in Python.
class InvalidProblem : public Error {
 public:
  using Error::Error;
};

/// A legal request that no back end (or not the forced one) can run. `NotImplementedError` in
/// Python.
class Unsupported : public Error {
 public:
  using Error::Error;
};

/// The template's parts; `hint` may be empty.
struct Violation {
  std::string op;
  std::string argument;
  std::string expected;
  std::string got;
  std::string hint;
};

/// "op: argument: expected …, got … (hint)".
std::string message_of(const Violation& violation);

/// Throws `Kind` with the message of `violation`.
template <typename Kind>
[[noreturn]] void raise(const Violation& violation) {
  throw Kind(message_of(violation), violation.argument);
}

/// Throws `Kind` about an argument of the operator.
template <typename Kind = InvalidProblem>
[[noreturn]] void reject(std::string argument, std::string expected, std::string got,
                         std::string hint = "") {
  raise<Kind>({"dilated_attention", std::move(argument), std::move(expected), std::move(got),
               std::move(hint)});
}

}  // namespace dilated
