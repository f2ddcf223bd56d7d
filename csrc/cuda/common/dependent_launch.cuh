#pragma once

#include <atomic>
#include <cstdint>

#include "common/launch_kernel.cuh"

// Programmatic dependent launch: from sm_90 on, the blocks of a kernel may take their places while
// the kernel before it in the stream ends, instead of a microsecond later.
namespace efft_kernels::cuda {

// First in a kernel that launch_dependent launches: until the kernel before has ended and what it
// wrote can be read. That one waited in the same way, so that all before it have ended as well.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The next kernel's blocks may take their places once all blocks of this one have come here.
__device__ __forceinline__ void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Whether the current device runs code of `kernel` that waits. Compiled from the PTX of an older
// architecture, as on a GPU that the build does not know, it does not. `known` and `waits` are the
// kernel's own, a bit per device.
template <class Kernel>
cudaError_t kernel_waits(Kernel* kernel, std::atomic<uint64_t>& known, std::atomic<uint64_t>& waits,
                         bool* result) {
  int index = 0;
  if (const cudaError_t error = cudaGetDevice(&index); error != cudaSuccess) return error;
  const uint64_t bit = index < 64 ? uint64_t{1} << index : 0;
  if (known.load() & bit) {
    *result = waits.load() & bit;
    return cudaSuccess;
  }
  cudaFuncAttributes attributes{};
  const cudaError_t error =
      cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel));
  if (error != cudaSuccess) return error;
  *result = attributes.ptxVersion >= 90;
  if (*result) waits.fetch_or(bit);
  known.fetch_or(bit);
  return cudaSuccess;
}

// launch_with_smem for a kernel that begins with wait_for_previous_kernel.
template <auto kKernel, class... Parameters>
cudaError_t launch_dependent(dim3 grid, int threads, int smem_bytes, cudaStream_t stream,
                             const Parameters&... parameters) {
  static std::atomic<uint64_t> prepared{0}, known{0}, waits{0};
  bool dependent = false;
  cudaError_t error = allow_smem(kKernel, smem_bytes, prepared);
  if (error == cudaSuccess) error = kernel_waits(kKernel, known, waits, &dependent);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(smem_bytes);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = dependent ? 1 : 0;
  return cudaLaunchKernelEx(&config, kKernel, parameters...);
}

}  // namespace efft_kernels::cuda
