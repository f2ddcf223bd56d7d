#pragma once

// Functions marked so run in kernels and, compiled by a plain C++ compiler, in the unit tests.
#ifdef __CUDACC__
#define EFFT_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define EFFT_HOST_DEVICE inline
#endif
