#define EFFT_ISA avx2
#define EFFT_KERNELS kAvx2
#define EFFT_TARGET "avx2,fma,f16c"
#define EFFT_SUPPORTED __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")
#define EFFT_VECTOR_BYTES 32
#define EFFT_ROWS 4
#define EFFT_VECTORS 3
#include "isa_x86.h"
