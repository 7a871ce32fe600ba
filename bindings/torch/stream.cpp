// The current CUDA stream, from whichever torch is loaded.
#include <stdexcept>

#include "bindings/torch/stable_abi.h"
#include <dlfcn.h>

namespace dilated::binding {

void* current_stream(const Tensor& tensor) {
  if (!tensor.is_cuda()) {
    return nullptr;
  }
  using Function = AOTITorchError (*)(std::int32_t device_index, void** stream);
  static const auto kFunction = [] {
    // Already loaded, if there is a CUDA tensor.
    void* const library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library == nullptr
               ? nullptr
               : reinterpret_cast<Function>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
  }();
  if (kFunction == nullptr) {
    throw std::runtime_error("dilated: torch's current CUDA stream cannot be found");
  }
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(kFunction(tensor.get_device_index(), &stream));
  return stream;
}

}  // namespace dilated::binding
