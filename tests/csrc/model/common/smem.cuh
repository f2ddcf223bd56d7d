#pragma once

#include "gpu.h"

namespace efft_kernels::cuda {

inline uint8_t* dynamic_smem() { return model::block().smem.data(); }

inline uint32_t smem_address(const void* p) {
  return static_cast<uint32_t>(static_cast<const uint8_t*>(p) - model::block().smem.data());
}

}  // namespace efft_kernels::cuda
