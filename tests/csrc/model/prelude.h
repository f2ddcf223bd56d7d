#pragma once

// Included before everything else: the CUDA headers as a plain C++ compiler sees them, then the
// kernels' keywords with the model's meaning.

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>
#include <vector_functions.h>

#include "gpu.h"

#undef __shared__
#undef __launch_bounds__
#undef __grid_constant__
#define __shared__ static
#define __launch_bounds__(...)
#define __grid_constant__
#define threadIdx (::model::current_thread().thread_idx)
#define blockIdx (::model::block().index)
#define gridDim (::model::block().grid)
#define blockDim (::dim3(static_cast<unsigned>(::model::block().threads.size())))
#define __syncwarp ::model::sync_warp
#define __trap() ::model::fail("a trap")
#define __syncthreads ::model::sync_block
#define __CUDA_ARCH__ 900
#define __CUDA_ARCH_FEAT_SM90_ALL
