#include "gemm/encode_tensor_map.h"

#include <cudaTypedefs.h>

namespace efft_kernels::cuda {
namespace {

PFN_cuTensorMapEncodeTiled_v12000 driver_function() {
  static const auto function = []() -> PFN_cuTensorMapEncodeTiled_v12000 {
    void* address = nullptr;
    cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &address,
                                                               12000, cudaEnableDefault, &found);
    if (error != cudaSuccess || found != cudaDriverEntryPointSuccess) return nullptr;
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(address);
  }();
  return function;
}

}  // namespace

cudaError_t encode_tensor_map(const TensorMapParams& params, Dtype dtype, CUtensorMap* map) {
  if (!tensor_map_error(params).empty()) return cudaErrorInvalidValue;
  const auto encode = driver_function();
  if (encode == nullptr) return cudaErrorNotSupported;
  const cuuint64_t dims[2] = {params.cols, params.rows};
  const cuuint64_t strides[1] = {params.row_bytes};
  const cuuint32_t box[2] = {params.box_cols, params.box_rows};
  const cuuint32_t steps[2] = {1, 1};
  const CUresult result = encode(
      map,
      dtype == Dtype::kHalf ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2,
      reinterpret_cast<void*>(params.address), dims, strides, box, steps,
      CU_TENSOR_MAP_INTERLEAVE_NONE,
      params.swizzle_bytes == 32 ? CU_TENSOR_MAP_SWIZZLE_32B : CU_TENSOR_MAP_SWIZZLE_128B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace efft_kernels::cuda
