// The integers by which Python names strategies and gradients to the native operators.
// efft_kernels/ops/schemas.py has the same order; tests/ops/test_codes.py compares the two.
#pragma once

#include <cstdint>

namespace efft_kernels {

enum Strategy : int64_t { kFused = 0, kSplit = 1, kMerged = 2 };

// Bits of `needs`: the gradients that are wanted.
enum Need : int64_t {
  kNeedX = 1 << 0,
  kNeedWeight = 1 << 1,
  kNeedBias = 1 << 2,
  kNeedDown = 1 << 3,
  kNeedCore = 1 << 4,
  kNeedUp = 1 << 5,
};

}  // namespace efft_kernels
