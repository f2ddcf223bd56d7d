#define EFFT_ISA avx512_bf16
#define EFFT_KERNELS kAvx512Bf16
#define EFFT_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c"
#define EFFT_SUPPORTED                                                            \
  __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&      \
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && \
      __builtin_cpu_supports("avx512bf16")
#define EFFT_PAIRS  // bfloat16 is multiplied two numbers at a time
#define EFFT_VECTOR_BYTES 64
#define EFFT_ROWS 8
#define EFFT_VECTORS 3
#include "isa_x86.h"
