#include "common/dependent_launch.cuh"
#include "common/dynamic_dtype.cuh"
#include "common/launchers.h"
#include "common/math.h"

// The second stage of the gradients' sums: partial sums added in a fixed order, in float32, and
// rounded once.
namespace efft_kernels::cuda {
namespace {

constexpr int kReduceQuads = 32;    // float4 columns of a block
constexpr int kReduceLanes = 16;    // threads that share the parts of one column
constexpr int kReduceInFlight = 8;  // loads of a thread: one batch up to 128 parts

__device__ __forceinline__ void add(float4& sum, const float4& value) {
  sum.x += value.x;
  sum.y += value.y;
  sum.z += value.z;
  sum.w += value.w;
}

__global__ void __launch_bounds__(kReduceQuads* kReduceLanes, 2)
    reduce_kernel(const __grid_constant__ ReduceArguments a,
                  const __grid_constant__ ReduceArguments b, int64_t blocks_a) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  __shared__ float4 sums[kReduceLanes][kReduceQuads];
  const bool first = blockIdx.x < blocks_a;
  const ReduceArguments& job = first ? a : b;
  const int64_t block = first ? blockIdx.x : blockIdx.x - blocks_a;
  const int quad = threadIdx.x % kReduceQuads;
  const int lane = threadIdx.x / kReduceQuads;
  const int64_t size = job.c * job.rank_padded;
  const int64_t at = (block * kReduceQuads + quad) * 4;
  const int64_t step = kReduceLanes * size;
  const int parts = at < size ? static_cast<int>(job.parts) : 0;
  const float* from = job.partial + lane * size + at;
  float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  for (int part = lane; part < parts; part += kReduceInFlight * kReduceLanes) {
    float4 values[kReduceInFlight];
#pragma unroll
    for (int i = 0; i < kReduceInFlight; ++i) {
      values[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      if (part + i * kReduceLanes < parts)
        values[i] = *reinterpret_cast<const float4*>(from + i * step);
    }
#pragma unroll
    for (int i = 0; i < kReduceInFlight; ++i) add(sum, values[i]);
    from += kReduceInFlight * step;
  }
  sums[lane][quad] = sum;
  __syncthreads();
  if (lane != 0 || at >= size) return;
#pragma unroll
  for (int other = 1; other < kReduceLanes; ++other) add(sum, sums[other][quad]);
  const float values[4] = {sum.x, sum.y, sum.z, sum.w};
  const int64_t c = at / job.rank_padded;
  const int r = static_cast<int>(at % job.rank_padded);
#pragma unroll
  for (int e = 0; e < 4; ++e)
    if (r + e < job.rank) store_from_float(job.out, job.out_dtype, c * job.rank + r + e, values[e]);
}

}  // namespace

cudaError_t launch_reduce(const ReduceArguments& first, const ReduceArguments& second,
                          cudaStream_t stream) {
  const auto blocks = [](const ReduceArguments& r) {
    return r.parts == 0 ? int64_t{0} : ceil_div(r.c * r.rank_padded, kReduceQuads * 4);
  };
  const int64_t total = blocks(first) + blocks(second);
  if (total == 0) return cudaSuccess;
  if (!fits_int32(total) || !fits_int32(first.parts) || !fits_int32(second.parts))
    return cudaErrorInvalidValue;
  return launch_dependent<reduce_kernel>(dim3(static_cast<unsigned>(total)),
                                         kReduceQuads * kReduceLanes, 0, stream, first, second,
                                         blocks(first));
}

}  // namespace efft_kernels::cuda
