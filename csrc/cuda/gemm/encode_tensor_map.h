#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include "common/arguments.h"
#include "gemm/tma.h"

namespace efft_kernels::cuda {

// Fills `map` for 16-bit elements of `dtype`, zeros beyond the tensor. The driver's
// function is looked up at run time, so that the library loads where there is no driver.
cudaError_t encode_tensor_map(const TensorMapParams& params, Dtype dtype, CUtensorMap* map);

}  // namespace efft_kernels::cuda
