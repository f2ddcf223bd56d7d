#pragma once

#include <torch/csrc/stable/tensor.h>

#include <stdexcept>
#include <string>

#include "common/device.h"

namespace efft_kernels::cuda {

class OnDeviceOf {
 public:
  explicit OnDeviceOf(const torch::stable::Tensor&) {}
  cudaStream_t stream() const { return nullptr; }
};

inline void check_cuda(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error("error " + std::to_string(error));
}

}  // namespace efft_kernels::cuda
