#pragma once

#include "common/arguments.h"
#include "common/convert.cuh"

// Numbers of a type known at run time, for the small kernels. What they read is of the type that
// they are compiled for: loads behind a branch each wait for the one before.
namespace efft_kernels::cuda {

// `launch.operator()<T>()` for a dtype known at run time.
template <class Launch>
cudaError_t for_dtype(Dtype dtype, const Launch& launch) {
  switch (dtype) {
    case Dtype::kHalf:
      return launch.template operator()<__half>();
    case Dtype::kBfloat16:
      return launch.template operator()<__nv_bfloat16>();
    default:
      return launch.template operator()<float>();
  }
}

// Element (i, j, 0) of a tensor of type T.
template <class T>
__device__ __forceinline__ const T* address_of(const Strided& t, int64_t i, int64_t j) {
  return static_cast<const T*>(t.data) + i * t.stride[0] + j * t.stride[1];
}

__device__ __forceinline__ void store_from_float(void* data, Dtype dtype, int64_t index,
                                                 float value) {
  switch (dtype) {
    case Dtype::kHalf:
      static_cast<__half*>(data)[index] = from_float<__half>(value);
      break;
    case Dtype::kBfloat16:
      static_cast<__nv_bfloat16*>(data)[index] = from_float<__nv_bfloat16>(value);
      break;
    default:
      static_cast<float*>(data)[index] = value;
  }
}

}  // namespace efft_kernels::cuda
