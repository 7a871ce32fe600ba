// Exchange plans as the Python front asks for them: integers and text.
#include <algorithm>
#include <cstdint>
#include <string>
#include <tuple>
#include <vector>

#include "dilated/exchange_plan.h"

#include "bindings/torch/arguments.h"
#include "bindings/torch/operators.h"

namespace dilated::binding {
namespace {

ExchangePlan plan_of(const Ints& shapes, const Ints& shards, std::optional<double> scale,
                     std::optional<double> out_scale, double dropout_p, const Ints& packed) {
  const CallOptions options = unpack(scale, out_scale, dropout_p, packed);
  return make_exchange_plan(make_problem(options.core, unpack_shapes(shapes)), shards);
}

void require_rank(std::int64_t rank, const ExchangePlan& plan) {
  if (rank < 0 || rank >= plan.num_ranks()) {
    reject("rank", "0 <= rank < " + std::to_string(plan.num_ranks()), std::to_string(rank));
  }
}

/// (runs, 7) of int64: peer, branch, kv_head, row, step, count, class_row.
Tensor table_of(const std::vector<ClassRun>& runs, std::int64_t ClassRun::* peer) {
  constexpr std::int64_t kColumns = 7;
  Tensor table = new_cpu_tensor({static_cast<std::int64_t>(runs.size()), kColumns},
                                torch::headeronly::ScalarType::Long);
  auto* next = static_cast<std::int64_t*>(table.mutable_data_ptr());
  for (const ClassRun& run : runs) {
    next = std::ranges::copy(Ints{run.*peer, static_cast<std::int64_t>(run.branch), run.kv_head,
                                  run.row, run.step, run.count, run.class_row},
                             next)
               .out;
  }
  return table;
}

/// What a rank sends and what it receives.
std::tuple<Tensor, Tensor> exchange_runs(const Ints& shapes, const Ints& shards, std::int64_t rank,
                                         std::optional<double> scale,
                                         std::optional<double> out_scale, double dropout_p,
                                         const Ints& packed) {
  const ExchangePlan plan = plan_of(shapes, shards, scale, out_scale, dropout_p, packed);
  require_rank(rank, plan);
  return {table_of(plan.sends(rank), &ClassRun::to),
          table_of(plan.receives(rank), &ClassRun::from)};
}

/// How far rows travel, class rows of the rank, bytes that it receives, the four hashes.
Ints exchange_numbers(const Ints& shapes, const Ints& shards, std::int64_t rank,
                      std::optional<double> scale, std::optional<double> out_scale,
                      double dropout_p, const Ints& packed) {
  const ExchangePlan plan = plan_of(shapes, shards, scale, out_scale, dropout_p, packed);
  require_rank(rank, plan);
  Ints numbers = {static_cast<std::int64_t>(plan.reach()), plan.class_row_count(rank),
                  plan.received_bytes(rank)};
  for (const std::uint64_t hash : plan.hash()) {
    numbers.push_back(static_cast<std::int64_t>(hash));
  }
  return numbers;
}

/// UTF-8.
Tensor print_exchange(const Ints& shapes, const Ints& shards, std::optional<double> scale,
                      std::optional<double> out_scale, double dropout_p, const Ints& packed) {
  const std::string text = plan_of(shapes, shards, scale, out_scale, dropout_p, packed).to_string();
  Tensor tensor =
      new_cpu_tensor({static_cast<std::int64_t>(text.size())}, torch::headeronly::ScalarType::Byte);
  std::ranges::copy(text, static_cast<char*>(tensor.mutable_data_ptr()));
  return tensor;
}

}  // namespace

void define_exchange(Library& library) {
  const std::string call = "int[] shapes, int[] shards, ";
  const std::string options = kOptionsSchema;
  library.def(
      ("exchange_runs(" + call + "int rank, " + options + ") -> (Tensor sends, Tensor receives)")
          .c_str());
  library.def(("exchange_numbers(" + call + "int rank, " + options + ") -> int[]").c_str());
  library.def(("print_exchange(" + call + options + ") -> Tensor").c_str());
}

void implement_exchange(Library& library) {
  library.impl("exchange_runs", TORCH_BOX(&Typed<&exchange_runs>::call));
  library.impl("exchange_numbers", TORCH_BOX(&Typed<&exchange_numbers>::call));
  library.impl("print_exchange", TORCH_BOX(&Typed<&print_exchange>::call));
}

}  // namespace dilated::binding
