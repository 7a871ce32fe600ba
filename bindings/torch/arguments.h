// Options as the operators take them. What PyTorch spends on a call grows with the number of its
// arguments, so all options but the three real numbers travel in one list of integers:
//   names    four bits each, the first row of `option_rows()` lowest: index of the name plus 1, 0
//   for
//            "not given"; then lse_grad and is_causal, 1 for false and 2 for true
//   lengths  of segments, dilations and the table of offsets, -1 for no table
//   heads    head_offset, total_heads, total_kv_heads, -1 for "not given"
//   lists    segments, dilations, table
// python/dilated/_options.py packs, `unpack` reads.
#pragma once

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "dilated/error.h"
#include "dilated/options.h"

#include "bindings/torch/inputs.h"

namespace dilated::binding {

using Ints = std::vector<std::int64_t>;

/// Tail of every schema that takes options.
inline constexpr const char* kOptionsSchema =
    "float? scale, float? out_scale, float dropout_p, SymInt[] options";

/// An argument of the operators and the names it accepts, in the order of their indices.
struct NameRow {
  std::string argument;
  std::vector<std::string> names;
};

/// Rows of packed options, in their order: layout, backend, preset, ..., gqa_offset.
const std::vector<NameRow>& option_rows();

struct CallOptions {
  Options core;
  Layout layout = Layout::kBshd;
  std::string backend;  // empty: the best
};

/// Throws InvalidProblem for a list that was not packed as described above.
CallOptions unpack(std::optional<double> scale, std::optional<double> out_scale, double dropout_p,
                   const Ints& packed);

/// Shapes of a configuration without tensors:
///   device (index in "cpu", "cuda"), threads, dtype (index of `dtype_names`), batch, seqlen,
///   num_heads, num_kv_heads, head_dim, has_key_mask, has_seqused, then all of cu_seqlens
Shapes unpack_shapes(const Ints& packed);

/// The four dtypes, in the order of their indices.
std::vector<std::string> dtype_names();
DType dtype_at(std::int64_t index);

/// python/dilated/errors.py turns what arrives back into the typed error: std::invalid_argument
/// becomes ValueError, std::runtime_error RuntimeError, both with exactly this text.
inline constexpr const char* kUnsupportedPrefix = "dilated::Unsupported: ";

template <auto kFunction>
struct Typed;

/// kFunction as a kernel whose errors leave C++ for Python.
template <typename Result, typename... Arguments, Result (*kFunction)(Arguments...)>
struct Typed<kFunction> {
  static Result call(Arguments... arguments) {
    try {
      return kFunction(std::forward<Arguments>(arguments)...);
    } catch (const InvalidProblem& error) {
      throw std::invalid_argument(error.what());
    } catch (const Unsupported& error) {
      throw std::runtime_error(kUnsupportedPrefix + std::string(error.what()));
    }
  }
};

}  // namespace dilated::binding
