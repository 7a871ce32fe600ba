// Questions about a configuration, answered by the core alone. Python holds no second copy of any
// rule.
#include "bindings/torch/queries.h"

#include <algorithm>
#include <string>
#include <tuple>
#include <vector>

#include "dilated/backend.h"
#include "dilated/error.h"
#include "dilated/plan.h"

#include "bindings/torch/arguments.h"
#include "bindings/torch/inputs.h"
#include "bindings/torch/stable_abi.h"

namespace dilated::binding {
namespace {

using Ints = std::vector<std::int64_t>;
using Texts = std::vector<std::string>;

/// Reads tensors back that `check` receives as flat lists.
class InfoReader {
 public:
  InfoReader(Texts names, Texts dtypes, Texts devices, const Ints& ranks, const Ints& sizes,
             const Ints& strides)
      : names_(std::move(names)), dtypes_(std::move(dtypes)), devices_(std::move(devices)) {
    std::ptrdiff_t begin = 0;
    for (std::size_t i = 0; i < names_.size(); ++i) {
      const std::ptrdiff_t end = begin + static_cast<std::ptrdiff_t>(ranks[i]);
      infos_.push_back({names_[i],
                        dtypes_[i],
                        devices_[i],
                        {sizes.begin() + begin, sizes.begin() + end},
                        {strides.begin() + begin, strides.begin() + end}});
      begin = end;
    }
  }

  std::optional<TensorInfo> find(const char* name) const {
    for (const TensorInfo& info : infos_) {
      if (info.name == name) {
        return info;
      }
    }
    return std::nullopt;
  }

 private:
  Texts names_, dtypes_, devices_;
  std::vector<TensorInfo> infos_;
};

/// Everything forward would reject about fake tensors; returns whether it saves branch results.
/// Values of cu_seqlens are unknown then: one sequence and empty ones stand in.
bool check(const Options& options, const std::vector<StringHandle>& names,
           const std::vector<StringHandle>& dtypes, const std::vector<StringHandle>& devices,
           const Ints& ranks, const Ints& sizes, const Ints& strides, StringHandle layout_name,
           StringHandle backend_name) {
  const std::string layout_text = take(layout_name);
  const std::string backend = take(backend_name);
  const InfoReader reader(take(names), take(dtypes), take(devices), ranks, sizes, strides);
  const Inputs inputs{*reader.find("query"),      *reader.find("key"),    *reader.find("value"),
                      reader.find("key_mask"),    reader.find("seqused"), reader.find("cu_seqlens"),
                      reader.find("dropout_seed")};
  const Layout layout = parse_layout(layout_text);
  Shapes shapes = shapes_of(inputs, layout, options.dropout_p);
  if (inputs.cu_seqlens) {
    shapes.cu_seqlens.assign(static_cast<std::size_t>(inputs.cu_seqlens->shape[0]), shapes.seqlen);
    shapes.cu_seqlens.front() = 0;
  }
  return make_plan(make_problem(options, shapes), backend).needs_branch_outputs();
}

std::tuple<Texts, Texts, Ints> list_backends() {
  std::tuple<Texts, Texts, Ints> lists;
  for (const BackendInfo& info : backends()) {
    std::get<0>(lists).push_back(info.name);
    std::get<1>(lists).push_back(info.description);
    std::get<2>(lists).push_back(info.available ? 1 : 0);
  }
  return lists;
}

Texts list_presets() {
  const auto names = preset_names();
  return {names.begin(), names.end()};
}

std::string explain_call(const Options& options, const Shapes& shapes, StringHandle backend) {
  return explain(make_problem(options, shapes), take(backend));
}

std::string print_plan(const Options& options, const Shapes& shapes, StringHandle backend) {
  return make_plan(make_problem(options, shapes), take(backend)).to_string();
}

/// (forward, backward) scratch bytes on `threads` threads.
Ints workspace_bytes(const Options& options, const Shapes& shapes, StringHandle backend,
                     std::int64_t threads) {
  Shapes on_threads = shapes;
  on_threads.device.units = threads;
  const Plan plan = make_plan(make_problem(options, on_threads), take(backend));
  return {plan.workspace_bytes(Pass::kForward), plan.workspace_bytes(Pass::kBackward)};
}

Ints count_call_pairs(const Options& options, const Shapes& shapes) {
  return count_pairs(make_problem(options, shapes));
}

/// (seqlen, seqlen) int32.
Tensor pattern(const Options& options, const Shapes& shapes, std::int64_t head) {
  const auto table = attention_pattern(make_problem(options, shapes), head);
  const Ints size = {shapes.seqlen, shapes.seqlen};
  const Tensor tensor = torch::stable::empty(size, torch::headeronly::ScalarType::Int);
  std::copy(table.begin(), table.end(), static_cast<std::int32_t*>(tensor.mutable_data_ptr()));
  return tensor;
}

/// Row-major (branches, num_heads).
Ints offsets(const Options& options, std::int64_t num_heads, std::int64_t num_kv_heads) {
  return build_offsets(options, num_heads, num_kv_heads);
}

bool column_sums(const Options& options) { return uses_column_sums(options); }

}  // namespace

void define_queries(torch::stable::detail::StableLibrary& library) {
  const std::string options = kOptionsSchema;
  const std::string shapes = std::string(kShapesSchema) + ", ";
  for (const std::string& schema : Texts{
           "check(str[] names, str[] dtypes, str[] devices, int[] ranks, int[] sizes, int[] "
           "strides, "
           "str layout, str backend, " +
               options + ") -> bool",
           "backends() -> (str[], str[], int[])",
           "presets() -> str[]",
           "explain(" + shapes + "str backend, " + options + ") -> str",
           "print_plan(" + shapes + "str backend, " + options + ") -> str",
           "workspace_bytes(" + shapes + "str backend, int threads, " + options + ") -> int[]",
           "count_pairs(" + shapes + options + ") -> int[]",
           "attention_pattern(" + shapes + "int head, " + options + ") -> Tensor",
           "offsets(int num_heads, int num_kv_heads, " + options + ") -> int[]",
           "uses_column_sums(" + options + ") -> bool",
       }) {
    library.def(schema.c_str());
  }
}

STABLE_TORCH_LIBRARY_IMPL(dilated, CompositeExplicitAutograd, library) {
  library.impl("check", TORCH_BOX(&WithOptions<&check>::call));
  library.impl("backends", TORCH_BOX(&list_backends));
  library.impl("presets", TORCH_BOX(&list_presets));
  library.impl("explain", TORCH_BOX((&WithOptions<&WithShapes<&explain_call>::call>::call)));
  library.impl("print_plan", TORCH_BOX((&WithOptions<&WithShapes<&print_plan>::call>::call)));
  library.impl("workspace_bytes",
               TORCH_BOX((&WithOptions<&WithShapes<&workspace_bytes>::call>::call)));
  library.impl("count_pairs",
               TORCH_BOX((&WithOptions<&WithShapes<&count_call_pairs>::call>::call)));
  library.impl("attention_pattern", TORCH_BOX((&WithOptions<&WithShapes<&pattern>::call>::call)));
  library.impl("offsets", TORCH_BOX(&WithOptions<&offsets>::call));
  library.impl("uses_column_sums", TORCH_BOX(&WithOptions<&column_sums>::call));
}

}  // namespace dilated::binding
