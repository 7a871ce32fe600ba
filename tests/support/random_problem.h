// Random problems with all options together, for RapidCheck, which shrinks and prints them with
// their seed.
#pragma once

#include <functional>
#include <string>

#include "tests/support/call.h"

namespace dilated::testing {

struct RandomCase {
  Problem problem;
  Inputs inputs;
};

struct RandomOptions {
  DType dtype = DType::kFloat32;
  std::int64_t max_seqlen = 70;
  std::int64_t max_head_dim = 40;
};

/// Draws one case; call only inside a RapidCheck property.
RandomCase draw_case(const RandomOptions& options);

/// `count`, or fewer where the environment variable DILATED_TEST_EFFORT (a factor, default 1) says
/// so.
int effort(int count);

/// Runs property `body` on effort(count) cases and fails the current GoogleTest test if it fails.
void check_property(const char* name, int count, const RandomOptions& options,
                    const std::function<std::string(const RandomCase&)>& body);

}  // namespace dilated::testing
