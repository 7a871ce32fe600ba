// Choice of a back end, and its explanation. No choice is ever made by catching a failure.
#include "dilated/backend.h"

#include <cstdlib>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "dilated/error.h"

#include "src/backend_table.h"

namespace dilated {
namespace {

struct Forced {
  std::string name;  // empty: no back end is forced
  const char* argument;
};

Forced forced_name(std::string_view argument) {
  if (!argument.empty()) {
    return {std::string(argument), "backend"};
  }
  const char* variable = std::getenv("DILATED_BACKEND");
  return {variable != nullptr ? variable : "", "DILATED_BACKEND"};
}

const Backend& find(const Forced& forced) {
  std::vector<std::string_view> names;
  for (const Backend* backend : backend_table()) {
    if (backend->name == forced.name) {
      return *backend;
    }
    names.push_back(backend->name);
  }
  raise<InvalidProblem>({"dilated_attention", forced.argument,
                         fmt::format("one of {}", fmt::join(names, ", ")), forced.name, ""});
}

/// A back end that rejects a problem is not asked whether it is available: calls on the CPU must
/// not wake a driver.
std::string reason_against(const Backend& backend, const Problem& problem) {
  const std::string reason = backend.rejects(problem);
  return reason.empty() ? backend.unavailable() : reason;
}

}  // namespace

const Backend& select_backend(const Problem& problem, std::string_view forced_argument) {
  const Forced forced = forced_name(forced_argument);
  if (!forced.name.empty()) {
    const Backend& backend = find(forced);
    const std::string reason = reason_against(backend, problem);
    if (!reason.empty()) {
      raise<Unsupported>({"dilated_attention", forced.argument,
                          "a back end that can run this problem", forced.name, reason});
    }
    return backend;
  }
  std::string reasons;
  for (const Backend* backend : backend_table()) {
    const std::string reason = reason_against(*backend, problem);
    if (reason.empty()) {
      return *backend;
    }
    reasons += fmt::format("{}{}: {}", reasons.empty() ? "" : "; ", backend->name, reason);
  }
  raise<Unsupported>({"dilated_attention", "backend", "a back end that can run this problem",
                      fmt::format("{} on {}", name_of(problem.dtype), name_of(problem.device.kind)),
                      reasons});
}

std::vector<BackendInfo> backends() {
  std::vector<BackendInfo> infos;
  for (const Backend* backend : backend_table()) {
    const std::string reason = backend->unavailable();
    infos.push_back({std::string(backend->name), reason.empty() ? backend->description() : reason,
                     reason.empty()});
  }
  return infos;
}

std::string explain(const Problem& problem, std::string_view forced_argument) {
  validate(problem);
  const Forced forced = forced_name(forced_argument);
  std::string text;
  const Backend* chosen = nullptr;
  if (!forced.name.empty()) {
    chosen = &find(forced);
    text = fmt::format("{} is forced by {}\n", chosen->name, forced.argument);
  }
  for (const Backend* backend : backend_table()) {
    const std::string reason = reason_against(*backend, problem);
    if (reason.empty() && chosen == nullptr) {
      chosen = backend;
    }
    if (!reason.empty()) {
      text += fmt::format("{:<9} cannot run this: {}\n", backend->name, reason);
    } else if (backend == chosen) {
      text += fmt::format("{:<9} runs this: {}\n", backend->name, backend->description());
    } else {
      text += fmt::format("{:<9} could run this, {} is preferred\n", backend->name, chosen->name);
    }
  }
  return text;
}

}  // namespace dilated
