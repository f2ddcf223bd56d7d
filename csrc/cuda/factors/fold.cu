#include "common/dynamic_dtype.cuh"
#include "common/launch_kernel.cuh"
#include "gemm/schedule.h"

// From (down, core, up) to the two thin factors the other kernels take, to W + ΔW for `merged`, and
// from d_B back to d_core and d_up. Some ten thousandths of a layer's own work, in float32 on the
// ordinary cores; what counts is that each is one launch.
namespace efft_kernels::cuda {
namespace {

constexpr int kThreads = 256;

// Elements are counted in 32 bits, in which a GPU divides quickly.
constexpr bool countable(int64_t elements) { return elements <= INT32_MAX - kThreads; }

// A thread per element of B, then of `down`. Neighbours share a row of `up`.
__global__ void __launch_bounds__(kThreads)
    fold_kernel(const __grid_constant__ FoldArguments f, int32_t b_count, int32_t down_count) {
  const int32_t index = static_cast<int32_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index < b_count) {
    const int32_t n = index / f.rank_padded;
    const int32_t a = index % f.rank_padded;
    const int32_t g = n / static_cast<int32_t>(f.slice_n);
    const int32_t in_slice = n % static_cast<int32_t>(f.slice_n);
    float sum = 0.0f;
    if (a < f.ra) {
      if (f.core.data == nullptr) {
        sum = load_at(f.up, g, in_slice, a);
      } else {
#pragma unroll 4
        for (int b = 0; b < f.rb; ++b)
          sum += load_at(f.up, g, in_slice, b) * load_at(f.core, g, a, b);
      }
    }
    store_from_float(f.b, f.out_dtype, index, sum);
    return;
  }
  const int32_t rest = index - b_count;
  if (rest >= down_count) return;
  // The reads of a transposed `down` are strided; its K·R elements are few and stay in L2.
  const int32_t width = f.transpose_down ? static_cast<int32_t>(f.k) : f.rank_padded;
  const int32_t k = f.transpose_down ? rest % width : rest / width;
  const int32_t a = f.transpose_down ? rest / width : rest % width;
  const float value = a < f.ra ? load_at(f.down, k, a, 0) : 0.0f;
  const int64_t to = f.transpose_down ? a * f.down_stride + k : k * f.down_stride + a;
  store_from_float(f.down_out, f.out_dtype, to, value);
}

constexpr int kMergeTile = 64;
constexpr int kMergeRank = 16;

// 64 × 64 elements of W + B·down^T per block, 4 × 4 per thread, 16 columns apart.
__global__ void __launch_bounds__(kThreads)
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
      sum[i][j] = n < m.n && k < m.k ? load_at(m.weight, n, k, 0) : 0.0f;
    }
  }
  for (int r0 = 0; m.b != nullptr && r0 < m.rank_padded; r0 += kMergeRank) {
    __syncthreads();
#pragma unroll
    for (int i = threadIdx.x; i < kMergeRank * kMergeTile; i += kThreads) {
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

constexpr int kUnfoldTile = 16;
constexpr int kUnfoldRows = 32;

// The first blocks form d_core, a 16 × 16 tile of one slice each; the rest d_up, a thread per
// element.
__global__ void __launch_bounds__(kThreads)
    unfold_kernel(const __grid_constant__ UnfoldArguments u, int32_t tiles_a, int32_t tiles_b,
                  uint32_t core_blocks) {
  __shared__ float d_b_tile[kUnfoldRows][kUnfoldTile];
  __shared__ float up_tile[kUnfoldRows][kUnfoldTile];
  if (blockIdx.x < core_blocks) {
    const int g = blockIdx.x / (tiles_a * tiles_b);
    const int a0 = blockIdx.x / tiles_b % tiles_a * kUnfoldTile;
    const int b0 = blockIdx.x % tiles_b * kUnfoldTile;
    const int ty = threadIdx.x / kUnfoldTile;
    const int tx = threadIdx.x % kUnfoldTile;
    float sum = 0.0f;
    for (int64_t first = 0; first < u.slice_n; first += kUnfoldRows) {
      __syncthreads();
#pragma unroll
      for (int i = 0; i < kUnfoldRows; i += kThreads / kUnfoldTile) {
        const int64_t n = first + i + ty;
        d_b_tile[i + ty][tx] =
            n < u.slice_n && a0 + tx < u.ra ? u.d_b[(g * u.slice_n + n) * u.ra + a0 + tx] : 0.0f;
        up_tile[i + ty][tx] = n < u.slice_n && b0 + tx < u.rb ? load_at(u.up, g, n, b0 + tx) : 0.0f;
      }
      __syncthreads();
#pragma unroll
      for (int n = 0; n < kUnfoldRows; ++n) sum += d_b_tile[n][ty] * up_tile[n][tx];
    }
    if (a0 + ty < u.ra && b0 + tx < u.rb)
      store_from_float(u.d_core, u.out_dtype, (g * u.ra + a0 + ty) * u.rb + b0 + tx, sum);
    return;
  }
  const int32_t index = static_cast<int32_t>(blockIdx.x - core_blocks) * kThreads + threadIdx.x;
  const auto slice_n = static_cast<int32_t>(u.slice_n);
  const auto slices = static_cast<int32_t>(u.slices);
  if (index >= (u.shared ? slice_n : slices * slice_n) * u.rb) return;
  const int32_t row = index / u.rb;
  const int32_t b = index % u.rb;
  const int32_t first = u.shared ? 0 : row / slice_n;
  const int32_t last = u.shared ? slices : first + 1;
  const int32_t n = u.shared ? row : row % slice_n;
  float sum = 0.0f;
  for (int32_t g = first; g < last; ++g) {
    const float* const d_b = u.d_b + (static_cast<int64_t>(g) * slice_n + n) * u.ra;
    if (u.core.data == nullptr) {
      sum += d_b[b];
    } else {
#pragma unroll 4
      for (int a = 0; a < u.ra; ++a) sum += d_b[a] * load_at(u.core, g, a, b);
    }
  }
  store_from_float(u.d_up, u.out_dtype, index, sum);
}

}  // namespace

cudaError_t launch_fold(const FoldArguments& f, cudaStream_t stream) {
  const int64_t b_count = f.b == nullptr ? 0 : f.slices * f.slice_n * f.rank_padded;
  const int64_t down_count = f.down_out == nullptr ? 0 : f.k * f.rank_padded;
  const int64_t blocks = ceil_div(b_count + down_count, kThreads);
  if (blocks == 0) return cudaSuccess;
  if (!countable(b_count + down_count)) return cudaErrorInvalidValue;
  return launch_kernel(fold_kernel, dim3(static_cast<unsigned>(blocks)), kThreads, 0, stream, f,
                       static_cast<int32_t>(b_count), static_cast<int32_t>(down_count));
}

cudaError_t launch_merge(const MergeArguments& m, cudaStream_t stream) {
  const int64_t tiles_k = ceil_div(m.k, kMergeTile);
  const int64_t blocks = ceil_div(m.n, kMergeTile) * tiles_k;
  if (blocks == 0) return cudaSuccess;
  return launch_kernel(merge_kernel, dim3(static_cast<unsigned>(blocks)), kThreads, 0, stream, m,
                       static_cast<int32_t>(tiles_k));
}

cudaError_t launch_unfold(const UnfoldArguments& u, cudaStream_t stream) {
  const auto tiles_a = static_cast<int32_t>(ceil_div(u.ra, kUnfoldTile));
  const auto tiles_b = static_cast<int32_t>(ceil_div(u.rb, kUnfoldTile));
  const int64_t core_blocks = u.d_core == nullptr ? 0 : u.slices * tiles_a * tiles_b;
  const int64_t up_count =
      u.d_up == nullptr ? 0 : (u.shared ? u.slice_n : u.slices * u.slice_n) * u.rb;
  const int64_t blocks = core_blocks + ceil_div(up_count, kThreads);
  if (blocks == 0) return cudaSuccess;
  if (!countable(u.slices * u.slice_n * u.rb)) return cudaErrorInvalidValue;
  return launch_kernel(unfold_kernel, dim3(static_cast<unsigned>(blocks)), kThreads, 0, stream, u,
                       tiles_a, tiles_b, static_cast<uint32_t>(core_blocks));
}

}  // namespace efft_kernels::cuda
