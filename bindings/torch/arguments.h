// Argument lists that several operators share, written once: a kernel takes `Options` (and
// `Shapes`) values, the operator's schema spells them out. Also the one place where errors leave
// C++ for Python.
#pragma once

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "dilated/error.h"
#include "dilated/options.h"

#include "bindings/torch/stable_abi.h"

namespace dilated::binding {

/// Tail of every schema that takes `Options`; the order is that of `WithOptions::call`.
inline constexpr const char* kOptionsSchema =
    "int[] segments, int[] dilations, str? preset, str? offsets, int[]? offset_table, str? groups, "
    "str? merge, float? out_scale, bool? lse_grad, str? tail, str? gqa_offset, bool is_causal, "
    "float? scale, float dropout_p";

/// Part of every schema that takes `Shapes`; the order is that of `WithShapes::call`.
inline constexpr const char* kShapesSchema =
    "str device, str dtype, int batch, int seqlen, int num_heads, int num_kv_heads, int head_dim, "
    "int[] cu_seqlens, bool has_key_mask, bool has_seqused";

/// python/dilated/errors.py turns what arrives back into the typed error: std::invalid_argument
/// becomes ValueError, std::runtime_error RuntimeError, both with exactly this text.
inline constexpr const char* kUnsupportedPrefix = "dilated::Unsupported: ";

template <auto kFunction>
struct WithOptions;

/// kFunction(options, rest...) as a kernel with arguments (rest..., kOptionsSchema).
template <typename Result, typename... Rest, Result (*kFunction)(const Options&, Rest...)>
struct WithOptions<kFunction> {
  static Result call(Rest... rest, const std::vector<std::int64_t>& segments,
                     const std::vector<std::int64_t>& dilations, std::optional<StringHandle> preset,
                     std::optional<StringHandle> offsets,
                     const std::optional<std::vector<std::int64_t>>& offset_table,
                     std::optional<StringHandle> groups, std::optional<StringHandle> merge,
                     std::optional<double> out_scale, std::optional<bool> lse_grad,
                     std::optional<StringHandle> tail, std::optional<StringHandle> gqa_offset,
                     bool is_causal, std::optional<double> scale, double dropout_p) {
    const Options options{segments,
                          dilations,
                          take(preset),
                          take(offsets),
                          offset_table,
                          take(groups),
                          take(merge),
                          out_scale,
                          lse_grad,
                          take(tail),
                          take(gqa_offset),
                          is_causal,
                          scale,
                          dropout_p,
                          0,
                          {},
                          {}};
    try {
      return kFunction(options, std::forward<Rest>(rest)...);
    } catch (const InvalidProblem& error) {
      throw std::invalid_argument(error.what());
    } catch (const Unsupported& error) {
      throw std::runtime_error(kUnsupportedPrefix + std::string(error.what()));
    }
  }
};

template <auto kFunction>
struct WithShapes;

/// kFunction(options, shapes, rest...) as a function of (options, kShapesSchema, rest...).
template <typename Result, typename... Rest,
          Result (*kFunction)(const Options&, const Shapes&, Rest...)>
struct WithShapes<kFunction> {
  static Result call(const Options& options, StringHandle device, StringHandle dtype,
                     std::int64_t batch, std::int64_t seqlen, std::int64_t num_heads,
                     std::int64_t num_kv_heads, std::int64_t head_dim,
                     const std::vector<std::int64_t>& cu_seqlens, bool has_key_mask,
                     bool has_seqused, Rest... rest) {
    const std::string device_name = take(device);
    const std::string dtype_name = take(dtype);
    Shapes shapes;
    shapes.device.kind = parse_device("device", device_name);
    shapes.dtype = parse_dtype("dtype", dtype_name);
    shapes.batch = batch;
    shapes.seqlen = seqlen;
    shapes.num_heads = num_heads;
    shapes.num_kv_heads = num_kv_heads;
    shapes.head_dim = head_dim;
    shapes.cu_seqlens = cu_seqlens;
    shapes.has_key_mask = has_key_mask;
    shapes.has_seqused = has_seqused;
    return kFunction(options, shapes, std::forward<Rest>(rest)...);
  }
};

}  // namespace dilated::binding
