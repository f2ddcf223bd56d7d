// The three passes, in float64 where `wide`, else in float32.
#pragma once

#include "backward.h"
#include "forward.h"
#include "mixed_batch.h"

namespace efft_kernels::cpu::EFFT_ISA {

inline void forward(const Forward& args, bool wide) {
  wide ? forward<double>(args) : forward<float>(args);
}

inline void backward(const Backward& args, bool wide) {
  wide ? backward<double>(args) : backward<float>(args);
}

inline void mixed_batch_forward(const MixedBatch& args, bool wide) {
  wide ? mixed_batch_forward<double>(args) : mixed_batch_forward<float>(args);
}

}  // namespace efft_kernels::cpu::EFFT_ISA
