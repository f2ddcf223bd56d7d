#pragma once

#include <cuda_runtime_api.h>

#include <atomic>
#include <cstdint>
#include <type_traits>

namespace efft_kernels::cuda {

// Lets `kernel` have `bytes` of dynamic shared memory on the current device. `prepared` is the
// kernel's own, a bit per device: the call is made once each.
template <class Kernel>
cudaError_t allow_smem(Kernel* kernel, int bytes, std::atomic<uint64_t>& prepared) {
  int index = 0;
  if (const cudaError_t error = cudaGetDevice(&index); error != cudaSuccess) return error;
  const uint64_t bit = index < 64 ? uint64_t{1} << index : 0;
  if (prepared.load() & bit) return cudaSuccess;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaSuccess) prepared.fetch_or(bit);
  return error;
}

template <class... Parameters>
cudaError_t launch_kernel(void (*kernel)(Parameters...), dim3 grid, int threads, int smem_bytes,
                          cudaStream_t stream, std::type_identity_t<Parameters>... parameters) {
  void* pointers[] = {static_cast<void*>(&parameters)...};
  return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid,
                          dim3(static_cast<unsigned>(threads)), pointers,
                          static_cast<size_t>(smem_bytes), stream);
}

// The same for a kernel with more dynamic shared memory than every kernel may have; `most`: of all
// its launches, where they differ.
template <auto kKernel, class... Parameters>
cudaError_t launch_with_up_to(int most, dim3 grid, int threads, int smem_bytes, cudaStream_t stream,
                              const Parameters&... parameters) {
  static std::atomic<uint64_t> prepared{0};
  if (const cudaError_t error = allow_smem(kKernel, most, prepared); error != cudaSuccess)
    return error;
  return launch_kernel(kKernel, grid, threads, smem_bytes, stream, parameters...);
}

template <auto kKernel, class... Parameters>
cudaError_t launch_with_smem(dim3 grid, int threads, int smem_bytes, cudaStream_t stream,
                             const Parameters&... parameters) {
  return launch_with_up_to<kKernel>(smem_bytes, grid, threads, smem_bytes, stream, parameters...);
}

// The same in clusters of `cluster` successive blocks.
template <auto kKernel, class... Parameters>
cudaError_t launch_clusters(int grid, int cluster, int threads, int smem_bytes, cudaStream_t stream,
                            Parameters... parameters) {
  static std::atomic<uint64_t> prepared{0};
  if (const cudaError_t error = allow_smem(kKernel, smem_bytes, prepared); error != cudaSuccess)
    return error;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(cluster);
  attribute.val.clusterDim.y = 1;
  attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(grid));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(smem_bytes);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  void* pointers[] = {static_cast<void*>(&parameters)...};
  return cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kKernel), pointers);
}

}  // namespace efft_kernels::cuda
