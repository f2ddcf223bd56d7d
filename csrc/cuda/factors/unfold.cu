#include "common/dynamic_dtype.cuh"
#include "common/launch_kernel.cuh"
#include "common/launchers.h"
#include "common/math.h"

// From d_B back to d_core and d_up, in float32 without tensor cores, in one launch.
namespace efft_kernels::cuda {
namespace {

constexpr int kUnfoldThreads = 256;
constexpr int kUnfoldTile = 16;
constexpr int kUnfoldRows = 32;

// The first blocks form d_core, a 16 × 16 tile of one slice each; the rest d_up, a thread per
// element.
__global__ void __launch_bounds__(kUnfoldThreads)
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
      for (int i = 0; i < kUnfoldRows; i += kUnfoldThreads / kUnfoldTile) {
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
  const int32_t index =
      static_cast<int32_t>(blockIdx.x - core_blocks) * kUnfoldThreads + threadIdx.x;
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

cudaError_t launch_unfold(const UnfoldArguments& u, cudaStream_t stream) {
  const auto tiles_a = static_cast<int32_t>(ceil_div(u.ra, kUnfoldTile));
  const auto tiles_b = static_cast<int32_t>(ceil_div(u.rb, kUnfoldTile));
  const int64_t core_blocks = u.d_core == nullptr ? 0 : u.slices * tiles_a * tiles_b;
  const int64_t up_count =
      u.d_up == nullptr ? 0 : (u.shared ? u.slice_n : u.slices * u.slice_n) * u.rb;
  const int64_t blocks = core_blocks + ceil_div(up_count, kUnfoldThreads);
  if (blocks == 0) return cudaSuccess;
  if (!fits_int32(u.slices * u.slice_n * u.rb + kUnfoldThreads)) return cudaErrorInvalidValue;
  return launch_kernel(unfold_kernel, dim3(static_cast<unsigned>(blocks)), kUnfoldThreads, 0,
                       stream, u, tiles_a, tiles_b, static_cast<uint32_t>(core_blocks));
}

}  // namespace efft_kernels::cuda
