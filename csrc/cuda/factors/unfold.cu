#include "common/dynamic_dtype.cuh"
#include "common/launch_kernel.cuh"
#include "common/launchers.h"
#include "common/math.h"

// From d_B back to d_core and d_up, in float32 without tensor cores, in one launch.
namespace efft_kernels::cuda {
namespace {

constexpr int kUnfoldThreads = 512;
constexpr int kUnfoldTile = 16;
constexpr int kTileSize = kUnfoldTile * kUnfoldTile;
// A half warp has a share of a slice's rows, a lane 4 × 4 elements of the tile.
constexpr int kRowShares = kUnfoldThreads / 16;

// A 16 × 16 tile of slice g's d_core.
template <class T>
__device__ __forceinline__ void unfold_core(const UnfoldArguments& u, int64_t g, int a0, int b0) {
  __shared__ float sums[kRowShares][kTileSize];
  const int share = threadIdx.x / 16;
  const int at_a = threadIdx.x % 4 * 4;
  const int at_b = threadIdx.x / 4 % 4 * 4;
  // Beyond the ranks a lane adds up what it does not store.
  int64_t a[4], b[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    a[i] = a0 + at_a + i < u.ra ? a0 + at_a + i : u.ra - 1;
    b[i] = (b0 + at_b + i < u.rb ? b0 + at_b + i : u.rb - 1) * u.up.stride[2];
  }
  const float* d_b = u.d_b + (g * u.slice_n + share) * u.ra;
  const T* up = address_of<T>(u.up, g, share);
  float sum[4][4] = {};
#pragma unroll 4
  for (int64_t n = share; n < u.slice_n; n += kRowShares) {
    float left[4], right[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) left[i] = d_b[a[i]];
#pragma unroll
    for (int i = 0; i < 4; ++i) right[i] = to_float(up[b[i]]);
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) sum[i][j] += left[i] * right[j];
    d_b += kRowShares * u.ra;
    up += kRowShares * u.up.stride[1];
  }
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) sums[share][(at_a + i) * kUnfoldTile + at_b + j] = sum[i][j];
  __syncthreads();
  const int element = threadIdx.x;
  const int64_t row = a0 + element / kUnfoldTile;
  const int64_t column = b0 + element % kUnfoldTile;
  if (element >= kTileSize || row >= u.ra || column >= u.rb) return;
  float total = 0.0f;
#pragma unroll
  for (int i = 0; i < kRowShares; ++i) total += sums[i][element];
  static_cast<T*>(u.d_core)[(g * u.ra + row) * u.rb + column] = from_float<T>(total);
}

// Element `index` of d_up.
template <class T>
__device__ __forceinline__ void unfold_up(const UnfoldArguments& u, int64_t index) {
  const int64_t row = index / u.rb;
  const int64_t b = index % u.rb;
  const int64_t first = u.shared ? 0 : row / u.slice_n;
  const int64_t last = u.shared ? u.slices : first + 1;
  const int64_t n = u.shared ? row : row % u.slice_n;
  float sum = 0.0f;
  for (int64_t g = first; g < last; ++g) {
    const float* const d_b = u.d_b + (g * u.slice_n + n) * u.ra;
    const T* const core = address_of<T>(u.core, g, 0) + b * u.core.stride[2];
#pragma unroll 8
    for (int a = 0; a < u.ra; ++a) sum += d_b[a] * to_float(core[a * u.core.stride[1]]);
  }
  static_cast<T*>(u.d_up)[index] = from_float<T>(sum);
}

// The first blocks form d_core, a tile each; the rest d_up, a thread per element. T: of core and
// up, and of their gradients.
template <class T>
__global__ void __launch_bounds__(kUnfoldThreads, 1)
    unfold_kernel(const __grid_constant__ UnfoldArguments u, int32_t tiles_a, int32_t tiles_b,
                  uint32_t core_blocks, int64_t up_count) {
  if (blockIdx.x < core_blocks) {
    const int tile = static_cast<int>(blockIdx.x);
    unfold_core<T>(u, tile / (tiles_a * tiles_b), tile / tiles_b % tiles_a * kUnfoldTile,
                   tile % tiles_b * kUnfoldTile);
  } else {
    const int64_t index =
        static_cast<int64_t>(blockIdx.x - core_blocks) * kUnfoldThreads + threadIdx.x;
    if (index < up_count) unfold_up<T>(u, index);
  }
}

}  // namespace

cudaError_t launch_unfold(const UnfoldArguments& u, cudaStream_t stream) {
  const auto tiles_a = static_cast<int32_t>(ceil_div(u.ra, kUnfoldTile));
  const auto tiles_b = static_cast<int32_t>(ceil_div(u.rb, kUnfoldTile));
  const int64_t core_blocks = u.d_core == nullptr ? 0 : u.slices * tiles_a * tiles_b;
  const int64_t up_count =
      u.d_up == nullptr ? 0 : (u.shared ? u.slice_n : u.slices * u.slice_n) * u.rb;
  const int64_t blocks = core_blocks + ceil_div(up_count, kUnfoldThreads);
  if (blocks == 0) return cudaSuccess;
  if (!fits_int32(blocks)) return cudaErrorInvalidValue;
  return for_dtype(u.dtype, [&]<class T>() {
    return launch_kernel(unfold_kernel<T>, dim3(static_cast<unsigned>(blocks)), kUnfoldThreads, 0,
                         stream, u, tiles_a, tiles_b, static_cast<uint32_t>(core_blocks), up_count);
  });
}

}  // namespace efft_kernels::cuda
