#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include "common/arguments.h"

// The sm_90a GEMM's launchers, one per file; sm90.cuh has the kernel.
namespace efft_kernels::cuda {

struct GemmMaps {
  CUtensorMap a;         // [M, I]
  CUtensorMap w;         // [C, I] or [I, C]
  CUtensorMap thin_in;   // [R, I] or [I, R]
  CUtensorMap p;         // [M, rank]
  CUtensorMap thin_out;  // [C, R] or [R, C]
};

cudaError_t launch_gemm_sm90_f16(const GemmArguments& g, const GemmMaps& maps, int block_c,
                                 const Device& device, cudaStream_t stream);
cudaError_t launch_gemm_sm90_bf16(const GemmArguments& g, const GemmMaps& maps, int block_c,
                                  const Device& device, cudaStream_t stream);

}  // namespace efft_kernels::cuda
