#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace efft_kernels::cuda {

// Position in a ring of stages. A barrier completes one phase per round, so the parity that its
// readers wait for flips each time round; writers wait for the other one, which a fresh barrier
// counts as complete.
template <int kStages>
struct Ring {
  int stage = 0;
  uint32_t parity = 0;

  EFFT_HOST_DEVICE void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

}  // namespace efft_kernels::cuda
