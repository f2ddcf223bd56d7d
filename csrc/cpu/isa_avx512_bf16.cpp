#include "isa.h"
#include "std.h"

#if defined(__x86_64__)

#define EFFT_ISA avx512_bf16
#define EFFT_PAIRS
#define EFFT_VECTOR_BYTES 64
#define EFFT_ROWS 8
#define EFFT_VECTORS 3

#if defined(__clang__)
#pragma clang attribute push(                                                               \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")
#endif
#include "passes.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace efft_kernels::cpu {

const Kernels kAvx512Bf16{
    "avx512_bf16",
    [] {
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
             __builtin_cpu_supports("avx512bf16");
    },
    avx512_bf16::forward,
    avx512_bf16::backward,
    avx512_bf16::mixed_batch_forward,
};

}  // namespace efft_kernels::cpu

#else

namespace efft_kernels::cpu {
const Kernels kAvx512Bf16{"avx512_bf16", [] { return false; }, nullptr, nullptr, nullptr};
}  // namespace efft_kernels::cpu

#endif
