#pragma once

#include <type_traits>

#include "gpu.h"

namespace efft_kernels::cuda {

template <class... Parameters>
cudaError_t launch_kernel(void (*kernel)(Parameters...), dim3 grid, int threads, int smem_bytes,
                          cudaStream_t, std::type_identity_t<Parameters>... parameters) {
  model::run_grid([&] { kernel(parameters...); }, grid, threads, smem_bytes);
  return cudaSuccess;
}

// As the driver would, by what the first launch of a kernel allowed.
template <auto kKernel, class... Parameters>
cudaError_t launch_with_up_to(int most, dim3 grid, int threads, int smem_bytes, cudaStream_t stream,
                              const Parameters&... parameters) {
  static const int allowed = most;
  model::check(smem_bytes <= allowed, "more shared memory than was allowed");
  return launch_kernel(kKernel, grid, threads, smem_bytes, stream, parameters...);
}

template <auto kKernel, class... Parameters>
cudaError_t launch_with_smem(dim3 grid, int threads, int smem_bytes, cudaStream_t stream,
                             const Parameters&... parameters) {
  return launch_with_up_to<kKernel>(smem_bytes, grid, threads, smem_bytes, stream, parameters...);
}

template <auto kKernel, class... Parameters>
cudaError_t launch_clusters(int grid, int cluster, int threads, int smem_bytes, cudaStream_t,
                            Parameters... parameters) {
  model::check(grid > 0 && grid % cluster == 0, "a grid of whole clusters");
  model::run_grid([&] { kKernel(parameters...); }, dim3(static_cast<unsigned>(grid)), threads,
                  smem_bytes, cluster);
  return cudaSuccess;
}

}  // namespace efft_kernels::cuda
