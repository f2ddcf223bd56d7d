#pragma once

#include "common/arguments.h"
#include "common/convert.cuh"

// Numbers of a type known at run time: for the small kernels, where a branch costs nothing.
namespace efft_kernels::cuda {

__device__ __forceinline__ float load_as_float(const void* data, Dtype dtype, int64_t index) {
  switch (dtype) {
    case Dtype::kHalf:
      return to_float(static_cast<const __half*>(data)[index]);
    case Dtype::kBfloat16:
      return to_float(static_cast<const __nv_bfloat16*>(data)[index]);
    default:
      return static_cast<const float*>(data)[index];
  }
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

__device__ __forceinline__ float load_at(const Strided& t, int64_t i, int64_t j, int64_t k) {
  return load_as_float(t.data, t.dtype, i * t.stride[0] + j * t.stride[1] + k * t.stride[2]);
}

}  // namespace efft_kernels::cuda
