// The model as the operators' device: four multiprocessors, Hopper's if EFFT_MODEL_SM90 is set.

#include "common/device.h"

#include <cstdlib>
#include <cstring>

namespace efft_kernels::cuda {

cudaError_t current_device(Device* device) {
  *device = {4, std::getenv("EFFT_MODEL_SM90") != nullptr};
  return cudaSuccess;
}

cudaError_t encode_tensor_map(const TensorMapParams& params, Dtype, CUtensorMap* map) {
  if (!tensor_map_error(params).empty()) return cudaErrorInvalidValue;
  static_assert(sizeof params <= sizeof *map);
  std::memcpy(static_cast<void*>(map), &params, sizeof params);
  return cudaSuccess;
}

}  // namespace efft_kernels::cuda
