#pragma once

#include "common/launch_kernel.cuh"

namespace efft_kernels::cuda {

// The model runs one kernel after the other.
inline void wait_for_previous_kernel() {}
inline void let_next_kernel_start() {}

template <auto kKernel, class... Parameters>
cudaError_t launch_dependent(dim3 grid, int threads, int smem_bytes, cudaStream_t stream,
                             const Parameters&... parameters) {
  return launch_kernel(kKernel, grid, threads, smem_bytes, stream, parameters...);
}

}  // namespace efft_kernels::cuda
