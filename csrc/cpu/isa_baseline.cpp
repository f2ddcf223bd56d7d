#include "isa.h"
#include "std.h"

#define EFFT_ISA baseline
#define EFFT_VECTOR_BYTES 16
#define EFFT_ROWS 4
#define EFFT_VECTORS 2
#include "passes.h"

namespace efft_kernels::cpu {

const Kernels kBaseline{
    "baseline",         [] { return true; },           baseline::forward,
    baseline::backward, baseline::mixed_batch_forward,
};

}  // namespace efft_kernels::cpu
