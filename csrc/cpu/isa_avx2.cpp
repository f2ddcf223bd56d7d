#include "isa.h"
#include "std.h"

#if defined(__x86_64__)

#define EFFT_ISA avx2
#define EFFT_VECTOR_BYTES 32
#define EFFT_ROWS 4
#define EFFT_VECTORS 3

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#include "passes.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace efft_kernels::cpu {

const Kernels kAvx2{
    "avx2",
    [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); },
    avx2::forward,
    avx2::backward,
    avx2::mixed_batch_forward,
};

}  // namespace efft_kernels::cpu

#else

namespace efft_kernels::cpu {
const Kernels kAvx2{"avx2", [] { return false; }, nullptr, nullptr, nullptr};
}  // namespace efft_kernels::cpu

#endif
