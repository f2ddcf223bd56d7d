// The integers by which Python names strategies, gradients and producers to the native operators.
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

// How x follows from what its producer kept; efft_kernels/ops/recompute.py has the same order.
enum MadeBy : int64_t { kPlain = 0, kLayerNorm = 1, kGelu = 2, kGeluTanh = 3 };

}  // namespace efft_kernels
