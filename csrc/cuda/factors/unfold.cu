#include "common/dependent_launch.cuh"
#include "common/dynamic_dtype.cuh"
#include "common/launchers.h"
#include "common/math.h"

// From d_B back to d_core and d_up, in float32 without tensor cores, in one launch.
namespace efft_kernels::cuda {
namespace {

constexpr int kUnfoldThreads = 512;
constexpr int kTileA = 16;
constexpr int kTileB = 4;
constexpr int kTileSize = kTileA * kTileB;
// Four threads have a share of a slice's rows, each for 4 × 4 elements of the tile.
constexpr int kRowShares = kUnfoldThreads / 4;

template <class T>
struct alignas(4 * sizeof(T)) Four {
  T value[4];
};

// Four neighbours of a row: at once, or each at its own offset.
template <bool kAtOnce, class T>
__device__ __forceinline__ Four<T> load_four(const T* row, const int64_t (&offset)[4]) {
  if constexpr (kAtOnce) return *reinterpret_cast<const Four<T>*>(row + offset[0]);
  return {row[offset[0]], row[offset[1]], row[offset[2]], row[offset[3]]};
}

// A 16 × 4 tile of slice g's d_core. `kFours`: rows of d_B and of up can be read by fours.
template <class T, bool kFours>
__device__ __forceinline__ void unfold_core(const UnfoldArguments& u, int64_t g, int a0, int b0) {
  constexpr int kBatch = kFours ? 8 : 4;  // rows whose loads are in flight together
  __shared__ float sums[kRowShares][kTileSize];
  const int share = threadIdx.x / 4;
  const int at_a = threadIdx.x % 4 * 4;
  // Beyond the ranks a thread adds up what is not stored.
  int64_t a[4], b[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int last_a = kFours ? u.ra - 4 : u.ra - 1;
    a[i] = a0 + at_a + i < last_a ? a0 + at_a + i : last_a;
    b[i] = (b0 + i < u.rb ? b0 + i : u.rb - 1) * u.up.stride[2];
  }
  const float* d_b = u.d_b + (g * u.slice_n + share) * u.ra;
  const T* up = address_of<T>(u.up, g, share);
  float sum[4][4] = {};
  for (int64_t n = share; n < u.slice_n; n += kBatch * kRowShares) {
    Four<float> left[kBatch];
    Four<T> right[kBatch];
#pragma unroll
    for (int row = 0; row < kBatch; ++row) {
      const int64_t next = n + row * kRowShares < u.slice_n ? row * kRowShares : 0;
      left[row] = load_four<kFours>(d_b + next * u.ra, a);
      right[row] = load_four<kFours>(up + next * u.up.stride[1], b);
    }
#pragma unroll
    for (int row = 0; row < kBatch; ++row) {
      const bool inside = n + row * kRowShares < u.slice_n;
      float d[4], factor[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        d[i] = inside ? left[row].value[i] : 0.0f;
        factor[i] = inside ? to_float(right[row].value[i]) : 0.0f;
      }
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[i][j] += d[i] * factor[j];
    }
    d_b += kBatch * kRowShares * u.ra;
    up += kBatch * kRowShares * u.up.stride[1];
  }
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) sums[share][(at_a + i) * kTileB + j] = sum[i][j];

  // The shares' sums, in two steps.
  constexpr int kGroups = kUnfoldThreads / kTileSize;
  const int element = threadIdx.x % kTileSize;
  const int group = threadIdx.x / kTileSize;
  __syncthreads();
  float total = 0.0f;
#pragma unroll
  for (int i = group; i < kRowShares; i += kGroups) total += sums[i][element];
  __syncthreads();
  sums[group][element] = total;
  __syncthreads();
  const int64_t row = a0 + element / kTileB;
  const int64_t column = b0 + element % kTileB;
  if (group != 0 || row >= u.ra || column >= u.rb) return;
#pragma unroll
  for (int i = 1; i < kGroups; ++i) total += sums[i][element];
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
template <class T, bool kFours>
__global__ void __launch_bounds__(kUnfoldThreads, 1)
    unfold_kernel(const __grid_constant__ UnfoldArguments u, int32_t tiles_a, int32_t tiles_b,
                  uint32_t core_blocks, int64_t up_count) {
  wait_for_previous_kernel();
  if (blockIdx.x < core_blocks) {
    const int tile = static_cast<int>(blockIdx.x);
    unfold_core<T, kFours>(u, tile / (tiles_a * tiles_b), tile / tiles_b % tiles_a * kTileA,
                           tile % tiles_b * kTileB);
  } else {
    const int64_t index =
        static_cast<int64_t>(blockIdx.x - core_blocks) * kUnfoldThreads + threadIdx.x;
    if (index < up_count) unfold_up<T>(u, index);
  }
}

// d_B is this library's own.
template <class T>
bool in_fours(const UnfoldArguments& u) {
  return u.ra % 4 == 0 && u.rb % 4 == 0 && u.up.stride[2] == 1 && u.up.stride[1] % 4 == 0 &&
         u.up.stride[0] % 4 == 0 && reinterpret_cast<uintptr_t>(u.up.data) % sizeof(Four<T>) == 0;
}

}  // namespace

cudaError_t launch_unfold(const UnfoldArguments& u, cudaStream_t stream) {
  const auto tiles_a = static_cast<int32_t>(ceil_div(u.ra, kTileA));
  const auto tiles_b = static_cast<int32_t>(ceil_div(u.rb, kTileB));
  const int64_t core_blocks = u.d_core == nullptr ? 0 : u.slices * tiles_a * tiles_b;
  const int64_t up_count =
      u.d_up == nullptr ? 0 : (u.shared ? u.slice_n : u.slices * u.slice_n) * u.rb;
  const int64_t blocks = core_blocks + ceil_div(up_count, kUnfoldThreads);
  if (blocks == 0) return cudaSuccess;
  if (!fits_int32(blocks)) return cudaErrorInvalidValue;
  return for_dtype(u.dtype, [&]<class T>() {
    const auto launch = [&]<bool kFours>() {
      return launch_dependent<unfold_kernel<T, kFours>>(
          dim3(static_cast<unsigned>(blocks)), kUnfoldThreads, 0, stream, u, tiles_a, tiles_b,
          static_cast<uint32_t>(core_blocks), up_count);
    };
    return in_fours<T>(u) ? launch.template operator()<true>()
                          : launch.template operator()<false>();
  });
}

}  // namespace efft_kernels::cuda
