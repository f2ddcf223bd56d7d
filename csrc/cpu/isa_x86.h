// The kernels of one x86 instruction set: passes.h compiled for it, and their entry in isa.h.
//
// The including file defines EFFT_KERNELS (that entry's name), EFFT_TARGET (the instructions, as
// compilers name them), EFFT_SUPPORTED (whether this processor has them) and vec.h's four.
#include "isa.h"
#include "std.h"

#define EFFT_NAME(x) EFFT_NAME_OF(x)
#define EFFT_NAME_OF(x) #x

#if defined(__x86_64__)

// clang-format off
#define EFFT_PRAGMA(x) EFFT_PRAGMA_OF(x)
#define EFFT_PRAGMA_OF(x) _Pragma(#x)
#if defined(__clang__)
EFFT_PRAGMA(clang attribute push(__attribute__((target(EFFT_TARGET))), apply_to = function))
#else
#pragma GCC push_options
EFFT_PRAGMA(GCC target(EFFT_TARGET))
#endif
// clang-format on
#include "passes.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace efft_kernels::cpu {

const Kernels EFFT_KERNELS{
    EFFT_NAME(EFFT_ISA), [] { return EFFT_SUPPORTED; }, EFFT_ISA::forward,
    EFFT_ISA::backward,  EFFT_ISA::mixed_batch_forward,
};

}  // namespace efft_kernels::cpu

#else

namespace efft_kernels::cpu {
const Kernels EFFT_KERNELS{EFFT_NAME(EFFT_ISA), [] { return false; }, nullptr, nullptr, nullptr};
}  // namespace efft_kernels::cpu

#endif
