#pragma once

#include "common/launch_kernel.cuh"
#include "common/pipeline.cuh"
#include "common/smem.cuh"
#include "common/tile.cuh"
#include "passes/config.h"

// What the passes over a tall matrix [M, C] and thin ones of R columns share. They are bound by
// memory: tiles of 64 × 64 arrive in a ring of asynchronous copies, 24 KB ahead per block. No
// atomics: the same inputs on the same device give the same bits.
namespace efft_kernels::cuda {

// A warp's 16 rows of acc += A·thin; A is the tile of the tall matrix, or its transpose, and thin
// [64, R] the rows that go with it.
template <class T, class Config, bool kTransposed>
__device__ __forceinline__ void add_product(float (&acc)[Config::kRank / 8][4], uint32_t tall_tile,
                                            uint32_t thin_tile) {
  const int warp = threadIdx.x / 32;
#pragma unroll
  for (int k = 0; k < (kTransposed ? Config::kRows : Config::kCols); k += 16) {
    uint32_t a[4];
    if constexpr (kTransposed) {
      load_a_from_cols<Config::kCols>(a, tall_tile, warp * 16, k);
    } else {
      load_a_from_rows<Config::kCols>(a, tall_tile, warp * 16, k);
    }
#pragma unroll
    for (int r = 0; r < Config::kRank; r += 16) {
      uint32_t b[4];
      load_b_from_cols<Config::kRank>(b, thin_tile, r, k);
      mma<T>(acc[r / 8], a, b[0], b[1]);
      mma<T>(acc[r / 8 + 1], a, b[2], b[3]);
    }
  }
}

// `launch.operator()<T, kRank>()` for a dtype and a rank known at run time.
template <class T, class Launch>
cudaError_t for_rank(int rank_padded, const Launch& launch) {
  switch (rank_padded) {
    case 16:
      return launch.template operator()<T, 16>();
    case 32:
      return launch.template operator()<T, 32>();
    case 64:
      return launch.template operator()<T, 64>();
    case 128:
      return launch.template operator()<T, 128>();
    default:
      return cudaErrorInvalidValue;
  }
}

template <class Launch>
cudaError_t for_dtype_and_rank(Dtype dtype, int rank_padded, const Launch& launch) {
  return dtype == Dtype::kHalf ? for_rank<__half>(rank_padded, launch)
                               : for_rank<__nv_bfloat16>(rank_padded, launch);
}

}  // namespace efft_kernels::cuda
