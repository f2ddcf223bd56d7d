#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace efft_kernels::cuda {

EFFT_HOST_DEVICE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

EFFT_HOST_DEVICE constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

constexpr bool fits_int32(int64_t a) { return a <= INT32_MAX; }

}  // namespace efft_kernels::cuda
