#pragma once

#include <cuda_runtime_api.h>

#include "common/arguments.h"

namespace efft_kernels::cuda {

// The current device's properties, read once per device.
cudaError_t current_device(Device* device);

}  // namespace efft_kernels::cuda
