#pragma once

#include "common/convert.cuh"
#include "common/dependent_launch.cuh"
#include "common/launch_kernel.cuh"
#include "common/pipeline.cuh"
#include "common/smem.cuh"
#include "common/tile.cuh"
#include "passes/config.h"

// What the passes over a tall matrix [M, C] and thin ones of R columns share. Tiles arrive in a
// ring of asynchronous copies, 24 KB or more ahead per block. No atomics: the same inputs on the
// same device give the same bits.
namespace efft_kernels::cuda {

// A warp's 16 rows of acc += A·thin; A is the tile of the tall matrix, or its transpose, and thin
// [64, R] the rows that go with it. The tiles start at multiples of 1024 bytes: that far an XOR
// moves along a swizzled row.
template <class T, class Config, bool kTransposed>
class Product {
 public:
  __device__ __forceinline__ Product() {
    const int lane = threadIdx.x % 32;
    const int m = threadIdx.x / 32 * 16;
    const LaneAddress a = kTransposed ? a_from_cols(lane) : a_from_rows(lane);
    const LaneAddress b = b_from_cols(lane);
    tall_ = kept(2 * (kTransposed ? swizzled<Config::kCols>(a.row, m / 8 + a.chunk)
                                  : swizzled<Config::kCols>(m + a.row, a.chunk)));
    thin_ = kept(2 * swizzled<Config::kRank>(b.row, b.chunk));
  }

  __device__ __forceinline__ void add(float (&acc)[Config::kRank / 8][4], uint32_t tall_tile,
                                      uint32_t thin_tile) const {
    const uint32_t tall = tall_tile + tall_;
    const uint32_t thin = thin_tile + thin_;
#pragma unroll
    for (int k = 0; k < 64; k += 16) {
      uint32_t a[4];
      if constexpr (kTransposed) {
        load_matrices_transposed(a, tall + k * Config::kCols * 2);
      } else {
        load_matrices(a, tall ^ k * 2);
      }
#pragma unroll
      for (int r = 0; r < Config::kRank; r += 16) {
        uint32_t b[4];
        load_matrices_transposed(b, (thin ^ r * 2) + k * Config::kRank * 2);
        mma<T>(acc[r / 8], a, b[0], b[1]);
        mma<T>(acc[r / 8 + 1], a, b[2], b[3]);
      }
    }
  }

 private:
  static_assert(Config::kTallElements * 2 % 1024 == 0 && Config::kStageElements * 2 % 1024 == 0);

  // This lane's addresses, from the tiles' starts.
  uint32_t tall_, thin_;
};

// Where S goes.
struct ThinOutput {
  void* s;  // [M, s_cols]
  int64_t s_stride;
  int32_t s_cols;
  void* s_copy;  // [M, rank] or null
  int64_t s_copy_stride;
  int64_t rows;
  int32_t rank;
};

inline ThinOutput thin_output(const Matrix& s, const Matrix& s_copy, int rank) {
  return {s.data, s.stride, static_cast<int32_t>(s.cols), s_copy.data, s_copy.stride, s.rows, rank};
}

// A warp's 16 rows of S, from row m on; zero beyond the rank, where an infinity in the tall matrix
// times the padding would be a NaN.
template <class T, int kRank>
__device__ __forceinline__ void store_s(const ThinOutput& t, int64_t m,
                                        const float (&s)[kRank / 8][4]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t row = m + accumulator_row(lane, half * 2);
    if (row >= t.rows) continue;
#pragma unroll
    for (int j = 0; j < kRank / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int r = j * 8 + accumulator_col(lane, e);
        const T rounded = from_float<T>(r < t.rank ? s[j][half * 2 + e] : 0.0f);
        if (r < t.s_cols) static_cast<T*>(t.s)[row * t.s_stride + r] = rounded;
        if (t.s_copy != nullptr && r < t.rank)
          static_cast<T*>(t.s_copy)[row * t.s_copy_stride + r] = rounded;
      }
    }
  }
}

// `launch.operator()<T, kRank, kWhole>()` for what is known at run time.
template <class T, bool kWhole, class Launch>
cudaError_t for_rank(int rank_padded, const Launch& launch) {
  switch (rank_padded) {
    case 16:
      return launch.template operator()<T, 16, kWhole>();
    case 32:
      return launch.template operator()<T, 32, kWhole>();
    case 64:
      return launch.template operator()<T, 64, kWhole>();
    case 128:
      return launch.template operator()<T, 128, kWhole>();
    default:
      return cudaErrorInvalidValue;
  }
}

template <class Launch>
cudaError_t for_pass(Dtype dtype, int rank_padded, bool whole, const Launch& launch) {
  if (dtype == Dtype::kHalf)
    return whole ? for_rank<__half, true>(rank_padded, launch)
                 : for_rank<__half, false>(rank_padded, launch);
  return whole ? for_rank<__nv_bfloat16, true>(rank_padded, launch)
               : for_rank<__nv_bfloat16, false>(rank_padded, launch);
}

}  // namespace efft_kernels::cuda
