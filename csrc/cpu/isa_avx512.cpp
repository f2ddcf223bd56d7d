#define EFFT_ISA avx512
#define EFFT_KERNELS kAvx512
#define EFFT_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"
#define EFFT_SUPPORTED                                                       \
  __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && \
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")
#define EFFT_VECTOR_BYTES 64
#define EFFT_ROWS 8
#define EFFT_VECTORS 3
#include "isa_x86.h"
