// M18, R14: strides and offsets beyond 2^31 elements. The tensors are views of a sparse
// anonymous mapping: only the touched pages take memory.
#include <algorithm>
#include <cerrno>
#include <cstring>

#include <gtest/gtest.h>

#include "tests/support/materialised.h"
#include <sys/mman.h>

namespace dilated {
namespace {

using testing::Inputs;
using testing::make_inputs;
using testing::Results;
using testing::Tensor;

constexpr std::int64_t kLength = 70;
constexpr std::int64_t kHeads = 2;
constexpr std::int64_t kHeadDim = 16;
constexpr std::int64_t kStride = std::int64_t{1} << 26;  // kLength * kStride > 2^32 elements

/// Address space without memory behind it.
class SparseMemory {
 public:
  explicit SparseMemory(std::size_t bytes) : bytes_(bytes) {
    memory_ = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  }
  ~SparseMemory() {
    if (memory_ != MAP_FAILED) {
      munmap(memory_, bytes_);
    }
  }
  SparseMemory(const SparseMemory&) = delete;
  SparseMemory& operator=(const SparseMemory&) = delete;

  bool ok() const { return memory_ != MAP_FAILED; }
  /// Tensor number `slot`: rows 2^26 elements apart.
  TensorView tensor(DType dtype, std::int64_t slot) const {
    auto* const data = static_cast<std::byte*>(memory_) + slot * kHeads * kHeadDim * 8;
    return {data, dtype, {1, kLength, kHeads, kHeadDim}, {kLength * kStride, kStride, kHeadDim, 1}};
  }
  RowView rows(DType dtype, std::int64_t slot) const {
    auto* const data = static_cast<std::byte*>(memory_) + slot * kHeads * kHeadDim * 8;
    return {data, dtype, {1, kHeads, kLength}, {kLength * kStride, 1, kStride}};
  }

 private:
  std::size_t bytes_;
  void* memory_;
};

template <typename Item>
Item* element(const TensorView& view, std::int64_t p, std::int64_t h) {
  return static_cast<Item*>(view.data) + p * view.strides[1] + h * view.strides[2];
}

ConstTensorView constant(const TensorView& view) {
  return {view.data, view.dtype, view.shape, view.strides};
}
ConstRowView constant(const RowView& view) {
  return {view.data, view.dtype, view.shape, view.strides};
}

template <typename Item>
void expect_far_rows_equal_near_ones(const char* backend, DType dtype) {
  const SparseMemory memory(static_cast<std::size_t>(kLength * kStride) *
                            std::max(sizeof(Item), sizeof(float)));
  ASSERT_TRUE(memory.ok()) << std::strerror(errno);
  Problem problem = testing::paper_problem(kLength, kHeads, kHeadDim, {{16, 1}, {64, 2}});
  problem.dtype = dtype;
  const Inputs inputs = make_inputs(problem, {.amplitude = 1.0});
  const Results near = testing::run(problem, inputs, {.backend = backend});
  const Plan plan = make_plan(problem, backend);

  std::int64_t slot = 0;
  const auto far = [&](const Tensor& tensor) {
    const TensorView view = memory.tensor(dtype, slot++);
    const ConstTensorView from = tensor.view();
    for (std::int64_t p = 0; p < kLength; ++p) {
      std::memcpy(element<Item>(view, p, 0),
                  static_cast<const Item*>(from.data) + p * kHeads * kHeadDim,
                  sizeof(Item) * kHeads * kHeadDim);
    }
    return constant(view);
  };
  ForwardTensors tensors;
  tensors.query = far(inputs.query);
  tensors.key = far(inputs.key);
  tensors.value = far(inputs.value);
  tensors.out = memory.tensor(dtype, slot++);
  tensors.lse = memory.rows(near.lse.dtype(), slot++);
  tensors.lse_residual = memory.rows(near.lse.dtype(), slot++);
  forward(plan, tensors);
  BackwardTensors gradients;
  gradients.dout = far(inputs.dout);
  gradients.query = tensors.query;
  gradients.key = tensors.key;
  gradients.value = tensors.value;
  gradients.out = constant(tensors.out);
  gradients.lse = constant(tensors.lse);
  gradients.lse_residual = constant(tensors.lse_residual);
  gradients.dquery = memory.tensor(dtype, slot++);
  gradients.dkey = memory.tensor(dtype, slot++);
  gradients.dvalue = memory.tensor(dtype, slot++);
  backward(plan, gradients);
  const std::pair<TensorView, const Tensor*> results[] = {{tensors.out, &near.out},
                                                          {gradients.dquery, &near.dquery},
                                                          {gradients.dkey, &near.dkey},
                                                          {gradients.dvalue, &near.dvalue}};
  for (const auto& [view, expected] : results) {
    const ConstTensorView from = expected->view();
    for (std::int64_t p = 0; p < kLength; ++p) {
      ASSERT_EQ(std::memcmp(element<Item>(view, p, 0),
                            static_cast<const Item*>(from.data) + p * kHeads * kHeadDim,
                            sizeof(Item) * kHeads * kHeadDim),
                0)
          << "row " << p;
    }
  }
}

TEST(Large, M18StridesBeyondTwoToTheThirtyOne) {
  expect_far_rows_equal_near_ones<float>("cpu", DType::kFloat32);
  expect_far_rows_equal_near_ones<std::uint16_t>("cpu", DType::kBFloat16);
  expect_far_rows_equal_near_ones<double>("reference", DType::kFloat64);
}

TEST(Large, PlansAndCountsOfManyTokensUse64Bits) {  // nothing is allocated
  Problem problem = testing::paper_problem(
      std::int64_t{1} << 33, 16, 48, {{std::int64_t{1} << 20, 1}, {std::int64_t{1} << 40, 16}});
  const std::int64_t dense = (std::int64_t{1} << 33) * (std::int64_t{1} << 20);
  EXPECT_EQ(count_pairs(problem)[0] / 16, dense);
  problem.merge = Merge::kSum;
  const Plan plan = make_plan(problem, "cpu");
  EXPECT_GT(plan.branch_rows(), std::int64_t{1} << 33);
  EXPECT_GE(plan.workspace_bytes(Pass::kBackward), 0);
}

}  // namespace
}  // namespace dilated
