#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

// Between float and the two 16-bit types, rounding to nearest even.
namespace efft_kernels::cuda {

template <class T>
__device__ __forceinline__ T from_float(float x);

template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

// Two neighbours as one register, `low` at the lower address.
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high);

template <>
__device__ __forceinline__ uint32_t pack<__half>(float low, float high) {
  const __half2 both = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(both);
}
template <>
__device__ __forceinline__ uint32_t pack<__nv_bfloat16>(float low, float high) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(both);
}

// The neighbours that `pack` put together.
template <class T>
__device__ __forceinline__ void unpack(float (&pair)[2], uint32_t both);

template <>
__device__ __forceinline__ void unpack<__half>(float (&pair)[2], uint32_t both) {
  const float2 values = __half22float2(reinterpret_cast<const __half2&>(both));
  pair[0] = values.x;
  pair[1] = values.y;
}
template <>
__device__ __forceinline__ void unpack<__nv_bfloat16>(float (&pair)[2], uint32_t both) {
  const float2 values = __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(both));
  pair[0] = values.x;
  pair[1] = values.y;
}

}  // namespace efft_kernels::cuda
