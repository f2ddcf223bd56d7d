#pragma once

#include <atomic>
#include <type_traits>

#include "gpu.h"

namespace efft_kernels::cuda {

template <class Kernel>
cudaError_t allow_smem(Kernel*, int, std::atomic<uint64_t>&) {
  return cudaSuccess;
}

template <class... Parameters>
cudaError_t launch_kernel(void (*kernel)(Parameters...), dim3 grid, int threads, int smem_bytes,
                          cudaStream_t, std::type_identity_t<Parameters>... parameters) {
  model::run_grid([&] { kernel(parameters...); }, grid, threads, smem_bytes);
  return cudaSuccess;
}

}  // namespace efft_kernels::cuda
