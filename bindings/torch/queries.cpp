// Questions about a configuration, answered by the core alone. Python holds no second copy of any
// rule. Texts are returned as bytes: strings that an operator returns are never freed.
#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "dilated/backend.h"
#include "dilated/plan.h"

#include "bindings/torch/arguments.h"
#include "bindings/torch/operators.h"

namespace dilated::binding {
namespace {

using Texts = std::vector<std::string>;

/// A 1-D uint8 tensor of UTF-8.
Tensor bytes_of(const std::string& text) {
  Tensor tensor =
      new_cpu_tensor({static_cast<std::int64_t>(text.size())}, torch::headeronly::ScalarType::Byte);
  std::copy(text.begin(), text.end(), static_cast<char*>(tensor.mutable_data_ptr()));
  return tensor;
}

std::string line_of(const std::string& word, const Texts& words) {
  std::string line = word;
  for (const std::string& next : words) {
    line += " " + next;
  }
  return line + "\n";
}

/// Lines "argument name name …": rows of packed options in their order, then "dtype" and
/// "column_sums", the presets whose branches are divided by their sums.
Tensor names() {
  std::string text;
  for (const NameRow& row : option_rows()) {
    text += line_of(row.argument, row.names);
  }
  text += line_of("dtype", dtype_names());
  Texts with_sums;
  for (const std::string_view preset : option_names("preset")) {
    Options options;
    options.preset = preset;
    if (uses_column_sums(options)) {
      with_sums.emplace_back(preset);
    }
  }
  return bytes_of(text + line_of("column_sums", with_sums));
}

/// Lines "name available description".
Tensor list_backends() {
  std::string text;
  for (const BackendInfo& info : backends()) {
    text += line_of(info.name, {info.available ? "1" : "0", info.description});
  }
  return bytes_of(text);
}

/// Reads tensors back that `check` receives as flat lists.
class InfoReader {
 public:
  InfoReader(const Texts& names, const Texts& dtypes, const Texts& devices, const Ints& ranks,
             const Ints& sizes, const Ints& strides) {
    std::ptrdiff_t begin = 0;
    for (std::size_t i = 0; i < names.size(); ++i) {
      const std::ptrdiff_t end = begin + static_cast<std::ptrdiff_t>(ranks[i]);
      infos_.push_back({names[i],
                        dtypes[i],
                        devices[i],
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
  std::vector<TensorInfo> infos_;
};

/// Values of cu_seqlens and windows are unknown: one sequence and empty ones stand in.
void stand_in(const Inputs& inputs, Layout layout, Shapes& shapes) {
  if (inputs.cu_seqlens) {
    shapes.cu_seqlens.assign(static_cast<std::size_t>(inputs.cu_seqlens->shape[0]), shapes.seqlen);
    shapes.cu_seqlens.front() = 0;
  }
  if (!inputs.windows) {
    return;
  }
  const std::int64_t queries = shapes.seqlen;
  const std::int64_t keys = inputs.key.shape[layout == Layout::kBshd   ? 1
                                             : layout == Layout::kBhsd ? 2
                                                                       : 0];
  const auto sequences = static_cast<std::size_t>(inputs.windows->shape[0]);
  shapes.seqlen = std::max(queries, keys);
  shapes.windows.assign(sequences, {{0, queries}, {0, keys}});
  if (layout == Layout::kShd) {
    shapes.cu_seqlens.assign(sequences + 1, shapes.seqlen);
    shapes.cu_seqlens.front() = 0;
    for (std::size_t s = 1; s < sequences; ++s) {
      shapes.windows[s] = {};
    }
  }
}

/// Everything forward would reject about fake tensors; returns the rows of branch results per head
/// that forward_saving saves.
std::int64_t check(const std::vector<StringHandle>& names, const std::vector<StringHandle>& dtypes,
                   const std::vector<StringHandle>& devices, const Ints& ranks, const Ints& sizes,
                   const Ints& strides, std::optional<double> scale,
                   std::optional<double> out_scale, double dropout_p, const Ints& packed) {
  const InfoReader reader(take(names), take(dtypes), take(devices), ranks, sizes, strides);
  const Inputs inputs{*reader.find("query"),  *reader.find("key"),
                      *reader.find("value"),  reader.find("key_mask"),
                      reader.find("seqused"), reader.find("cu_seqlens"),
                      reader.find("windows"), reader.find("dropout_seed")};
  const CallOptions options = unpack(scale, out_scale, dropout_p, packed);
  Shapes shapes = shapes_of(inputs, options.layout, dropout_p);
  stand_in(inputs, options.layout, shapes);
  const Plan plan = make_plan(make_problem(options.core, shapes), options.backend);
  return plan.needs_branch_outputs() ? plan.branch_rows() : 0;
}

/// Whether some back end runs this dtype and head_dim.
bool runs(bool on_cuda, std::int64_t dtype, std::int64_t head_dim, std::optional<double> scale,
          std::optional<double> out_scale, double dropout_p, const Ints& packed) {
  Problem problem;
  problem.device.kind = on_cuda ? Device::kCuda : Device::kCpu;
  problem.dtype = dtype_at(dtype);
  problem.head_dim = head_dim;
  problem.branches = {{1, 1, {0}}};
  try {
    make_plan(problem, unpack(scale, out_scale, dropout_p, packed).backend);
  } catch (const Unsupported&) {
    return false;
  }
  return true;
}

/// What no shape could make legal.
void check_options(std::optional<double> scale, std::optional<double> out_scale, double dropout_p,
                   const Ints& packed) {
  const Options options = unpack(scale, out_scale, dropout_p, packed).core;
  const auto branches = static_cast<std::int64_t>(options.segments.size());
  Shapes shapes;
  const std::int64_t total = options.total_heads.value_or(options.head_offset + branches);
  shapes.num_heads = std::max<std::int64_t>(1, total - options.head_offset);
  if (options.offset_table && branches > 0) {
    shapes.num_heads = static_cast<std::int64_t>(options.offset_table->size()) / branches;
  }
  shapes.num_kv_heads = shapes.num_heads;
  shapes.head_dim = 1;
  make_problem(options, shapes);
}

/// A configuration without tensors.
struct Question {
  Question(const Ints& packed_shapes, std::optional<double> scale, std::optional<double> out_scale,
           double dropout_p, const Ints& packed)
      : options(unpack(scale, out_scale, dropout_p, packed)),
        problem(make_problem(options.core, unpack_shapes(packed_shapes))) {
    if (problem.device.kind ==
        Device::kCuda) {  // whose kernels differ: tensors as torch makes them
      const std::int64_t bits = 64 | (problem.head_dim * size_of(problem.dtype));
      problem.alignment = bits & -bits;
    }
  }

  Plan plan() const { return make_plan(problem, options.backend); }

  CallOptions options;
  Problem problem;
};

Tensor explain_op(const Ints& shapes, std::optional<double> scale, std::optional<double> out_scale,
                  double dropout_p, const Ints& packed) {
  const Question question(shapes, scale, out_scale, dropout_p, packed);
  return bytes_of(explain(question.problem, question.options.backend));
}

Tensor print_plan(const Ints& shapes, std::optional<double> scale, std::optional<double> out_scale,
                  double dropout_p, const Ints& packed) {
  return bytes_of(Question(shapes, scale, out_scale, dropout_p, packed).plan().to_string());
}

/// (forward, backward).
Ints workspace_bytes(const Ints& shapes, std::optional<double> scale,
                     std::optional<double> out_scale, double dropout_p, const Ints& packed) {
  const Plan plan = Question(shapes, scale, out_scale, dropout_p, packed).plan();
  return {plan.workspace_bytes(Pass::kForward), plan.workspace_bytes(Pass::kBackward)};
}

Ints count_pairs_op(const Ints& shapes, std::optional<double> scale,
                    std::optional<double> out_scale, double dropout_p, const Ints& packed) {
  return count_pairs(Question(shapes, scale, out_scale, dropout_p, packed).problem);
}

/// (seqlen, seqlen) int32.
Tensor attention_pattern_op(const Ints& shapes, std::int64_t head, std::optional<double> scale,
                            std::optional<double> out_scale, double dropout_p, const Ints& packed) {
  const Problem problem = Question(shapes, scale, out_scale, dropout_p, packed).problem;
  const auto table = attention_pattern(problem, head);
  Tensor tensor =
      new_cpu_tensor({problem.seqlen, problem.seqlen}, torch::headeronly::ScalarType::Int);
  std::copy(table.begin(), table.end(), static_cast<std::int32_t*>(tensor.mutable_data_ptr()));
  return tensor;
}

/// Row-major (branches, num_heads).
Ints offsets(std::int64_t num_heads, std::int64_t num_kv_heads, std::optional<double> scale,
             std::optional<double> out_scale, double dropout_p, const Ints& packed) {
  return build_offsets(unpack(scale, out_scale, dropout_p, packed).core, num_heads, num_kv_heads);
}

}  // namespace

void define_queries(Library& library) {
  const std::string options = kOptionsSchema;
  const std::string configuration = "int[] shapes, " + options;
  for (const std::string& schema : Texts{
           "names() -> Tensor",
           "backends() -> Tensor",
           "check(str[] names, str[] dtypes, str[] devices, int[] ranks, int[] sizes, int[] "
           "strides, " +
               options + ") -> int",
           "runs(bool on_cuda, int dtype, int head_dim, " + options + ") -> bool",
           "check_options(" + options + ") -> ()",
           "explain(" + configuration + ") -> Tensor",
           "print_plan(" + configuration + ") -> Tensor",
           "workspace_bytes(" + configuration + ") -> int[]",
           "count_pairs(" + configuration + ") -> int[]",
           "attention_pattern(int[] shapes, int head, " + options + ") -> Tensor",
           "offsets(int num_heads, int num_kv_heads, " + options + ") -> int[]",
       }) {
    library.def(schema.c_str());
  }
}

void implement_queries(Library& library) {
  library.impl("names", TORCH_BOX(&names));
  library.impl("backends", TORCH_BOX(&list_backends));
  library.impl("check", TORCH_BOX(&Typed<&check>::call));
  library.impl("runs", TORCH_BOX(&Typed<&runs>::call));
  library.impl("check_options", TORCH_BOX(&Typed<&check_options>::call));
  library.impl("explain", TORCH_BOX(&Typed<&explain_op>::call));
  library.impl("print_plan", TORCH_BOX(&Typed<&print_plan>::call));
  library.impl("workspace_bytes", TORCH_BOX(&Typed<&workspace_bytes>::call));
  library.impl("count_pairs", TORCH_BOX(&Typed<&count_pairs_op>::call));
  library.impl("attention_pattern", TORCH_BOX(&Typed<&attention_pattern_op>::call));
  library.impl("offsets", TORCH_BOX(&Typed<&offsets>::call));
}

}  // namespace dilated::binding
