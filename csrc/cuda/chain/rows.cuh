#pragma once

#include "chain/sizes.h"
#include "common/convert.cuh"
#include "common/launch_kernel.cuh"
#include "common/ptx_sm80.cuh"
#include "common/smem.cuh"

// What the norm's two kernels share.
namespace efft_kernels::cuda {

// This warp's columns of the 8 rows from `row` on of a contiguous [rows, width], to shared memory
// in rows of kStride bytes; zeros beyond the matrix. Asynchronous: to be committed and awaited.
template <class Element, int kStride>
__device__ __forceinline__ void copy_rows(uint32_t to, const void* from, int64_t row, int64_t rows,
                                          int64_t width) {
  constexpr int kChunks = kChainCols * sizeof(Element) / 16;  // of a row
  const int lane = threadIdx.x % 32;
  const int first_col = threadIdx.x / 32 * kChainCols;
#pragma unroll
  for (int i = 0; i < kNormRows * kChunks / 32; ++i) {
    const int r = (i * 32 + lane) / kChunks;
    const int chunk = (i * 32 + lane) % kChunks;
    const bool inside = row + r < rows;
    const Element* const at = static_cast<const Element*>(from) + (inside ? row + r : 0) * width +
                              first_col + chunk * (16 / static_cast<int>(sizeof(Element)));
    copy_async(to + r * kStride + chunk * 16, at, inside ? 16 : 0);
  }
}

__device__ __forceinline__ const float4& floats_at(const uint8_t* p) {
  return *reinterpret_cast<const float4*>(p);
}

// Four neighbours of a 16-bit type.
template <class T>
__device__ __forceinline__ void halves_at(float (&values)[4], const void* p) {
  const uint2 both = *static_cast<const uint2*>(p);
  float low[2], high[2];
  unpack<T>(low, both.x);
  unpack<T>(high, both.y);
  values[0] = low[0], values[1] = low[1], values[2] = high[0], values[3] = high[1];
}

template <class T>
__device__ __forceinline__ uint2 packed(const float (&values)[4]) {
  return make_uint2(pack<T>(values[0], values[1]), pack<T>(values[2], values[3]));
}

template <class T>
__device__ __forceinline__ uint32_t pack_elements(T low, T high) {
  return static_cast<uint32_t>(reinterpret_cast<const uint16_t&>(low)) |
         static_cast<uint32_t>(reinterpret_cast<const uint16_t&>(high)) << 16;
}

// thin[row, r] of a contiguous [rows, rank], zero beyond it.
template <class T>
__device__ __forceinline__ T thin_at(const void* thin, int64_t row, int64_t rows, int r, int rank) {
  return row < rows && r < rank ? static_cast<const T*>(thin)[row * rank + r] : from_float<T>(0.0f);
}

// `launch.operator()<threads>()`, the most that rows of `width` may take.
template <class Launch>
cudaError_t for_width(int64_t width, const Launch& launch) {
  return chain_threads(width) <= kChainFewThreads ? launch.template operator()<kChainFewThreads>()
                                                  : launch.template operator()<kChainMostThreads>();
}

}  // namespace efft_kernels::cuda
