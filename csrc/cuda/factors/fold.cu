#include "common/dependent_launch.cuh"
#include "common/dynamic_dtype.cuh"
#include "common/launch_kernel.cuh"
#include "common/launchers.h"
#include "common/math.h"

// From (down, core, up) to the two thin factors that the other kernels take: B, with core folded
// into up, and down, cast and padded. It is some ten thousandths of a layer's own work, in float32
// without tensor cores; what counts is that it is one launch.
namespace efft_kernels::cuda {
namespace {

constexpr int kFoldThreads = 256;

// A thread per element of B, then of `down`. Neighbours share a row of `up`. T: of all three.
template <class T>
__global__ void __launch_bounds__(kFoldThreads)
    fold_kernel(const __grid_constant__ FoldArguments f, int32_t b_count, int32_t down_count) {
  let_next_kernel_start();
  const int32_t index = static_cast<int32_t>(blockIdx.x) * kFoldThreads + threadIdx.x;
  if (index < b_count) {
    const int32_t n = index / f.rank_padded;
    const int32_t a = index % f.rank_padded;
    const int32_t g = n / static_cast<int32_t>(f.slice_n);
    const int32_t in_slice = n % static_cast<int32_t>(f.slice_n);
    float sum = 0.0f;
    if (a < f.ra) {
      const T* const up = address_of<T>(f.up, g, in_slice);
      if (f.core.data == nullptr) {
        sum = to_float(up[a * f.up.stride[2]]);
      } else {
        const T* const core = address_of<T>(f.core, g, a);
#pragma unroll 8
        for (int b = 0; b < f.rb; ++b)
          sum += to_float(up[b * f.up.stride[2]]) * to_float(core[b * f.core.stride[2]]);
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
  const float value = a < f.ra ? to_float(*address_of<T>(f.down, k, a)) : 0.0f;
  const int64_t to = f.transpose_down ? a * f.down_stride + k : k * f.down_stride + a;
  store_from_float(f.down_out, f.out_dtype, to, value);
}

}  // namespace

cudaError_t launch_fold(const FoldArguments& f, cudaStream_t stream) {
  const int64_t b_count = f.b == nullptr ? 0 : f.slices * f.slice_n * f.rank_padded;
  const int64_t down_count = f.down_out == nullptr ? 0 : f.k * f.rank_padded;
  const int64_t blocks = ceil_div(b_count + down_count, kFoldThreads);
  if (blocks == 0) return cudaSuccess;
  if (!fits_int32(b_count + down_count + kFoldThreads)) return cudaErrorInvalidValue;
  return for_dtype(f.down.dtype, [&]<class T>() {
    return launch_kernel(fold_kernel<T>, dim3(static_cast<unsigned>(blocks)), kFoldThreads, 0,
                         stream, f, static_cast<int32_t>(b_count),
                         static_cast<int32_t>(down_count));
  });
}

}  // namespace efft_kernels::cuda
