// The only file that spells PyTorch: its stable ABI (2.11), mapped to the core's views and threads.
//   Tensor -> TensorInfo (inputs.h) and pointers;  str -> std::string;  parallel_for -> ParallelFor
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "dilated/parallel_for.h"

#include "bindings/torch/inputs.h"

namespace dilated::binding {

using torch::stable::Tensor;

/// A `str` argument. Read through the C functions: torch 2.13's own conversion to std::string
/// leaks.
inline std::string take(StringHandle handle) {
  std::size_t length = 0;
  const char* characters = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
  STABLE_TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &characters));
  std::string text(characters, length);
  STABLE_TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
  return text;
}

inline std::vector<std::string> take(const std::vector<StringHandle>& handles) {
  std::vector<std::string> texts;
  texts.reserve(handles.size());
  for (const StringHandle handle : handles) {
    texts.push_back(take(handle));
  }
  return texts;
}

/// Python's name of a dtype, without "torch.".
inline std::string_view dtype_name(const Tensor& tensor) {
  using torch::headeronly::ScalarType;
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Bool:
      return "bool";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::ComplexFloat:
      return "complex64";
    case ScalarType::ComplexDouble:
      return "complex128";
    default:
      return "another dtype";
  }
}

inline torch::headeronly::ScalarType scalar_type_of(DType dtype) {
  using torch::headeronly::ScalarType;
  switch (dtype) {
    case DType::kFloat64:
      return ScalarType::Double;
    case DType::kBFloat16:
      return ScalarType::BFloat16;
    case DType::kFloat16:
      return ScalarType::Half;
    case DType::kFloat32:
      break;
  }
  return ScalarType::Float;
}

inline TensorInfo info_of(const char* name, const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  const auto strides = tensor.strides();
  std::string device = "another device";
  if (tensor.is_cpu()) {
    device = "cpu";
  } else if (tensor.is_cuda()) {
    device = "cuda:" + std::to_string(tensor.get_device_index());
  }
  return {name,
          std::string(dtype_name(tensor)),
          std::move(device),
          {sizes.begin(), sizes.end()},
          {strides.begin(), strides.end()}};
}

inline std::optional<TensorInfo> info_of(const char* name, const std::optional<Tensor>& tensor) {
  return tensor ? std::optional<TensorInfo>(info_of(name, *tensor)) : std::nullopt;
}

/// An uninitialised contiguous tensor. The C function costs 0.5 us, the dispatcher's new_empty 1.5
/// us, and a call makes three tensors or more.
inline Tensor new_empty(std::int32_t device_type, std::int32_t device_index,
                        const std::vector<std::int64_t>& shape,
                        torch::headeronly::ScalarType type) {
  std::vector<std::int64_t> strides(shape.size());
  std::int64_t step = 1;
  for (std::size_t i = shape.size(); i-- > 0;) {
    strides[i] = step;
    step *= shape[i] > 0 ? shape[i] : 1;
  }
  const auto shim_type = torch::stable::detail::to<std::int32_t>(torch::stable::detail::from(type));
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<std::int64_t>(shape.size()),
                                                         shape.data(), strides.data(), shim_type,
                                                         device_type, device_index, &handle));
  return Tensor(handle);
}

/// On the device of `like`.
inline Tensor new_empty(const Tensor& like, const std::vector<std::int64_t>& shape,
                        torch::headeronly::ScalarType type) {
  std::int32_t device_type = 0;
  std::int32_t device_index = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  return new_empty(device_type, device_index, shape, type);
}

/// On the CPU, whatever torch's default device is.
inline Tensor new_cpu_tensor(const std::vector<std::int64_t>& shape,
                             torch::headeronly::ScalarType type) {
  return new_empty(aoti_torch_device_type_cpu(), 0, shape, type);
}

inline Tensor new_empty(const Tensor& like, const std::vector<std::int64_t>& shape, DType dtype) {
  return new_empty(like, shape, scalar_type_of(dtype));
}

/// Scratch memory from torch's allocator (64-byte aligned on the CPU).
inline Tensor new_workspace(const Tensor& like, std::int64_t bytes) {
  return new_empty(like, {bytes}, torch::headeronly::ScalarType::Byte);
}

/// Current stream of a CUDA tensor's device, a cudaStream_t; null for other tensors. The stable ABI
/// of 2.11 has no such handle, so torch's C function is looked up where it lives: a CPU-only torch
/// lacks it. Throws std::runtime_error if it cannot be found.
void* current_stream(const Tensor& tensor);

/// torch's threads, so that there is no second pool: never more than torch.get_num_threads().
class TorchParallelFor final : public ParallelFor {
 public:
  TorchParallelFor();
  int num_threads() const override { return num_threads_; }
  void run(int threads, const Body& body) const override;

 private:
  int num_threads_;
};

}  // namespace dilated::binding
