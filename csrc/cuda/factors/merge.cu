#include "common/dynamic_dtype.cuh"
#include "common/launch_kernel.cuh"
#include "common/launchers.h"
#include "common/math.h"

// W + ΔW for `merged`, and W cast to x's dtype, in float32 without tensor cores.
namespace efft_kernels::cuda {
namespace {

constexpr int kMergeThreads = 256;
constexpr int kMergeTile = 64;
constexpr int kMergeRank = 16;

// 64 × 64 elements of W + B·down^T per block, 4 × 4 per thread, 16 columns apart.
template <class T>
__global__ void __launch_bounds__(kMergeThreads)
    merge_kernel(const __grid_constant__ MergeArguments m, int32_t tiles_k) {
  __shared__ float b_tile[kMergeRank][kMergeTile + 1];
  __shared__ float down_tile[kMergeRank][kMergeTile];
  const int64_t n0 = static_cast<int64_t>(blockIdx.x / tiles_k) * kMergeTile;
  const int64_t k0 = static_cast<int64_t>(blockIdx.x % tiles_k) * kMergeTile;
  const int ty = threadIdx.x / 16;
  const int tx = threadIdx.x % 16;
  float sum[4][4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int64_t n = n0 + ty + i * 16;
      const int64_t k = k0 + tx + j * 16;
      sum[i][j] = n < m.n && k < m.k ? to_float(*address_of<T>(m.weight, n, k)) : 0.0f;
    }
  }
  for (int r0 = 0; m.b != nullptr && r0 < m.rank_padded; r0 += kMergeRank) {
    __syncthreads();
#pragma unroll
    for (int i = threadIdx.x; i < kMergeRank * kMergeTile; i += kMergeThreads) {
      const int64_t n = n0 + i / kMergeRank;
      b_tile[i % kMergeRank][i / kMergeRank] =
          n < m.n ? m.b[n * m.rank_padded + r0 + i % kMergeRank] : 0.0f;
      const int64_t k = k0 + i % kMergeTile;
      down_tile[i / kMergeTile][i % kMergeTile] =
          k < m.k ? m.down[(r0 + i / kMergeTile) * m.down_stride + k] : 0.0f;
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < kMergeRank; ++r) {
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[i][j] += b_tile[r][ty + i * 16] * down_tile[r][tx + j * 16];
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int64_t n = n0 + ty + i * 16;
      const int64_t k = k0 + tx + j * 16;
      if (n < m.n && k < m.k) store_from_float(m.out, m.out_dtype, n * m.k + k, sum[i][j]);
    }
  }
}

}  // namespace

cudaError_t launch_merge(const MergeArguments& m, cudaStream_t stream) {
  const int64_t tiles_k = ceil_div(m.k, kMergeTile);
  const int64_t blocks = ceil_div(m.n, kMergeTile) * tiles_k;
  if (blocks == 0) return cudaSuccess;
  return for_dtype(m.weight.dtype, [&]<class T>() {
    return launch_kernel(merge_kernel<T>, dim3(static_cast<unsigned>(blocks)), kMergeThreads, 0,
                         stream, m, static_cast<int32_t>(tiles_k));
  });
}

}  // namespace efft_kernels::cuda
