#pragma once

#include <cstdint>

namespace efft_kernels::cuda {

// The block's dynamic shared memory, and addresses in it as the instructions take them.
__device__ __forceinline__ uint8_t* dynamic_smem() {
  extern __shared__ __align__(1024) uint8_t smem[];
  return smem;
}

__device__ __forceinline__ uint32_t smem_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

}  // namespace efft_kernels::cuda
