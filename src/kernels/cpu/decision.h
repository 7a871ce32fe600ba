// What the CPU back end decides for a problem: how work is cut and what scratch it takes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "dilated/decision.h"
#include "dilated/problem.h"

namespace dilated::cpu {

struct CpuDecision final : Decision {
  std::int64_t threads;
  /// Branch numbers in ascending order of segment length, the order of forward; backward goes down.
  std::vector<std::size_t> branch_order;
  /// Consecutive query positions of one forward work item. Long, so that a packed key tile serves
  /// many rows of a sparse class, but short enough for 32 items per thread: with 1536 at head_dim
  /// 64 and 768 at 128 the paper's configuration was 3 and 6 % slower on two AVX-512 cores.
  std::int64_t forward_block;
  /// Rows of one class whose queries and sums stay in L2 (8 bytes per element, at most 768 KB)
  /// while all keys pass by. No bit of the result depends on it, nor on `forward_block`.
  std::int64_t forward_chunk;
  /// Query rows whose q, g and dq stay in L2 (12 bytes per element, about 768 KB) while all keys
  /// pass by.
  std::int64_t backward_chunk;
  // Bytes of one thread's tiles.
  std::int64_t forward_scratch;
  std::int64_t backward_scratch;
  /// Bytes of the float32 gradients that 16-bit dtypes are summed in: dquery, dkey, dvalue.
  std::int64_t gradients;

  explicit CpuDecision(const Problem& problem);
  std::int64_t workspace_bytes(Pass pass) const override;
  std::string to_string() const override;
};

}  // namespace dilated::cpu
