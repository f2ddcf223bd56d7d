#pragma once

namespace efft_kernels::cuda {

// Bytes of shared memory that a block may have.
constexpr int kSm86SmemLimit = 99 * 1024;  // also sm_89 and sm_120: the least from sm_80 on
constexpr int kSm90SmemLimit = 227 * 1024;

}  // namespace efft_kernels::cuda
