// Batch elements, cu_seqlens and windows to sequences.
#include "src/sequences.h"

namespace dilated {

std::vector<Sequence> sequences_of(const Problem& problem) {
  const bool packed = !problem.cu_seqlens.empty();
  std::vector<Sequence> sequences;
  sequences.reserve(static_cast<std::size_t>(problem.num_sequences()));
  std::int64_t query_row = 0;
  std::int64_t key_row = 0;
  for (std::int64_t s = 0; s < problem.num_sequences(); ++s) {
    const auto at = static_cast<std::size_t>(s);
    const std::int64_t length =
        packed ? problem.cu_seqlens[at + 1] - problem.cu_seqlens[at] : problem.seqlen;
    const Window window =
        problem.windows.empty() ? Window{{0, length}, {0, length}} : problem.windows[at];
    sequences.push_back({packed ? 0 : s, length, window.queries, window.keys, query_row, key_row});
    if (packed) {
      query_row += window.queries.size();
      key_row += window.keys.size();
    }
  }
  return sequences;
}

}  // namespace dilated
