// On the model a CUtensorMap holds its TensorMapParams.

#include "gemm/encode_tensor_map.h"

#include <cstring>

namespace efft_kernels::cuda {

cudaError_t encode_tensor_map(const TensorMapParams& params, Dtype, CUtensorMap* map) {
  if (!tensor_map_error(params).empty()) return cudaErrorInvalidValue;
  static_assert(sizeof params <= sizeof *map);
  std::memcpy(static_cast<void*>(map), &params, sizeof params);
  return cudaSuccess;
}

}  // namespace efft_kernels::cuda
