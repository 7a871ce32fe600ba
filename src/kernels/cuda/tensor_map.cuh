// A branch as tensor maps. Token i r + c of a sequence is element (i, c) of a 5-D tensor
//   (column, row i, residue c, head, batch)   with strides   (1, r, 1, head, batch) rows,
// so that the rows of one residue are consecutive and a box of them is one bulk copy. Residues
// c < n mod r have one row more than the others; two maps with tight extents keep every access
// inside the allocation. Nothing but this file and geometry.h knows of dilation.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#include <cuda.h>
#include <cuda_runtime_api.h>

#include "dilated/tensor_view.h"

#include "src/geometry.h"

namespace dilated::gpu {

/// Rows of a tensor (batch, rows, heads, columns) whose columns are dense; strides in bytes.
struct RowTensor {
  void* data;
  std::int64_t batch, rows, heads, columns;
  std::int64_t batch_stride, row_stride, head_stride;
  CUtensorMapDataType type;
  std::int64_t element;  // bytes
};

/// Of 16-bit elements.
inline RowTensor row_tensor(const ConstTensorView& view) {
  constexpr std::int64_t kBytes = 2;
  return {const_cast<void*>(view.data),  // read only
          view.shape[0],
          view.shape[1],
          view.shape[2],
          view.shape[3],
          view.strides[0] * kBytes,
          view.strides[1] * kBytes,
          view.strides[2] * kBytes,
          view.dtype == DType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                         : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
          kBytes};
}

struct MapOptions {
  std::uint32_t box_rows = 128;
  std::uint32_t box_columns = 64;
  CUtensorMapSwizzle swizzle = CU_TENSOR_MAP_SWIZZLE_128B;
  CUtensorMapL2promotion promotion = CU_TENSOR_MAP_L2_PROMOTION_L2_256B;
};

/// Driver's encoder, found at run time: the library does not link against libcuda.
inline decltype(&cuTensorMapEncodeTiled) tensor_map_encoder() {
  static const auto encoder = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found{};
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                               12000, cudaEnableDefault, &found);
    if (error != cudaSuccess || function == nullptr) {
      throw std::runtime_error("cuTensorMapEncodeTiled: not found in the CUDA driver");
    }
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  return encoder;
}

/// A tiled map of rank 5; `strides` in bytes, of dimensions 1 to 4.
inline CUtensorMap encode_map(void* data, CUtensorMapDataType type, const cuuint64_t (&extents)[5],
                              const cuuint64_t (&strides)[4], const MapOptions& options) {
  const cuuint32_t box[5] = {options.box_columns, options.box_rows, 1, 1, 1};
  const cuuint32_t steps[5] = {1, 1, 1, 1, 1};
  CUtensorMap map{};
  const CUresult result = tensor_map_encoder()(
      &map, type, 5, data, extents, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      options.swizzle, options.promotion, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error("cuTensorMapEncodeTiled: error " + std::to_string(result));
  }
  return map;
}

/// The rows of one dilation: `at(c)` is the map of residue c.
struct DilatedMaps {
  CUtensorMap shorter;  // residues with floor(rows / r) rows
  CUtensorMap longer;   // residues c < rows mod r
  int longer_residues;  // rows mod r

  __device__ const CUtensorMap& at(int residue) const {
    return residue < longer_residues ? longer : shorter;
  }
};

inline DilatedMaps dilated_maps(const RowTensor& tensor, std::int64_t dilation,
                                const MapOptions& options) {
  // Beyond the tensor a dilation has no further rows; strides are limited.
  const std::int64_t step = std::min(dilation, std::max<std::int64_t>(tensor.rows, 1));
  const auto encode = [&](std::int64_t rows, std::int64_t residues) {
    const auto size = [](std::int64_t n) { return static_cast<cuuint64_t>(n); };
    return encode_map(
        tensor.data, tensor.type,
        {size(tensor.columns), size(rows), size(residues), size(tensor.heads), size(tensor.batch)},
        {size(step * tensor.row_stride), size(tensor.row_stride), size(tensor.head_stride),
         size(tensor.batch_stride)},
        options);
  };
  const std::int64_t shorter = tensor.rows / dilation;
  const std::int64_t rest = tensor.rows % dilation;
  DilatedMaps maps{};
  maps.longer_residues = static_cast<int>(rest);
  if (shorter > 0) {
    maps.shorter = encode(shorter, dilation);
  }
  if (rest > 0) {
    maps.longer = encode(shorter + 1, rest);
  }
  return maps;
}

}  // namespace dilated::gpu
