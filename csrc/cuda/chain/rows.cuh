#pragma once

#include "chain/sizes.h"
#include "common/convert.cuh"
#include "common/launch_kernel.cuh"
#include "common/ptx_sm80.cuh"
#include "common/smem.cuh"

// What the chain's kernels share.
namespace efft_kernels::cuda {

// This warp's columns of the kRows rows from `row` on of a contiguous [rows, width], to shared
// memory in rows of kStride bytes; zeros beyond the matrix. Asynchronous: to be committed and
// awaited. `first_col`: the block's.
template <class Element, int kStride, int kRows = kNormRows>
__device__ __forceinline__ void copy_rows(uint32_t to, const void* from, int64_t row, int64_t rows,
                                          int32_t width, int32_t first_col = 0) {
  constexpr int kChunks = kChainCols * sizeof(Element) / 16;  // of a row
  const int lane = threadIdx.x % 32;
  const int chunk = lane % kChunks;
  // The tile's address is the same for all lanes, which have 32 bits of their own each.
  const Element* const tile = static_cast<const Element*>(from) + row * width;
  const int32_t left = rows - row < kRows ? static_cast<int32_t>(rows - row) : kRows;
  const int32_t first =
      first_col + threadIdx.x / 32 * kChainCols + chunk * (16 / static_cast<int>(sizeof(Element)));
  const auto copy = [&](int i, bool whole) {
    const int r = i * (32 / kChunks) + lane / kChunks;
    const bool inside = whole || r < left;
    copy_async(to + r * kStride + chunk * 16, tile + ((inside ? r : 0) * width + first),
               inside ? 16 : 0);
  };
  if (left == kRows) {  // all tiles but the last, in fewer instructions
#pragma unroll
    for (int i = 0; i < kRows * kChunks / 32; ++i) copy(i, true);
  } else {
#pragma unroll
    for (int i = 0; i < kRows * kChunks / 32; ++i) copy(i, false);
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

// Operands a of thin^T·tall^T for 32 columns from `first_col` on of a contiguous [cols, rank], by
// 16: the transposed of pairs of rows, where a lane has four columns from 4·(lane / 4) on, are
// operands b of it.
template <class T>
__device__ __forceinline__ void load_across(uint32_t (&a)[2][4], const void* thin,
                                            int64_t first_col, int64_t cols, int rank) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int r = lane / 4 + i % 2 * 8;
    const int64_t c = first_col + lane % 4 * 8 + i / 2;
    a[i / 4][i % 4] =
        pack_elements(thin_at<T>(thin, c, cols, r, rank), thin_at<T>(thin, c + 4, cols, r, rank));
  }
}

// Puts a warp's part of P^T or S^T over 8 rows, ranks down and rows along, in its place.
__device__ __forceinline__ void put_thin(float* part, const float (&product)[4]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int e = 0; e < 4; ++e)
    part[(lane % 4 * 2 + e % 2) * kThinRow + lane / 4 + e / 2 * 8] = product[e];
}

// Element i of P or S [kRows, R] of a tile, from the parts of `warps` warps, at most kWarps.
template <int kWarps, int kRows>
__device__ __forceinline__ float sum_of_warps(const float* parts, int i, int warps) {
  const float* const part = parts + i / kChainRank * kThinRow + i % kChainRank;
  float sum = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w)
    if (w < warps) sum += part[w * kRows * kThinRow];
  return sum;
}

// A tile's rows of P or S [rows, rank] from the parts of up to kWarps warps.
template <class T, int kWarps, int kRows = kNormRows>
__device__ __forceinline__ void store_thin(void* thin, int32_t tile, int64_t rows, int rank,
                                           const float* parts) {
  for (int i = threadIdx.x; i < kRows * kChainRank; i += blockDim.x) {
    const int r = i % kChainRank;
    const int64_t row = int64_t{tile} * kRows + i / kChainRank;
    if (row >= rows || r >= rank) continue;
    static_cast<T*>(thin)[row * rank + r] =
        from_float<T>(sum_of_warps<kWarps, kRows>(parts, i, blockDim.x / 32));
  }
}

// Sums [columns, R] of this warp's columns, where a lane had four columns from 4·(lane / 4) on.
__device__ __forceinline__ void store_sums(float* partial,
                                           const float (&sums)[kChainCols / 32][4][4]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int block = 0; block < kChainCols / 32; ++block) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        // Column n of the product is that of the lane which had it as operand b.
        const int c = threadIdx.x / 32 * kChainCols + block * 32 + (lane % 4 * 2 + e % 2) * 4 + j;
        partial[c * kChainRank + lane / 4 + e / 2 * 8] = sums[block][j][e];
      }
    }
  }
}

// `launch.operator()<threads>()`, the most that rows of `width` may take, up to kMost.
template <int kMost, class Launch>
cudaError_t for_width(int64_t width, const Launch& launch) {
  const int threads = chain_threads(width);
  if constexpr (kMost > kChainMoreThreads)
    if (threads > kChainMoreThreads) return launch.template operator()<kChainMostThreads>();
  if constexpr (kMost > kChainFewThreads)
    if (threads > kChainFewThreads) return launch.template operator()<kChainMoreThreads>();
  return launch.template operator()<kChainFewThreads>();
}

}  // namespace efft_kernels::cuda
