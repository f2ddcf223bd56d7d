#include "common/convert.cuh"
#include "common/launchers.h"
#include "passes/pass.cuh"

// S = tall·thin_in, rounded; with `p`, in the same pass, the partial sums of tall^T·P.
namespace efft_kernels::cuda {
namespace {

struct ThinParameters {
  Operand tall;     // [M, C]
  Operand thin_in;  // [C, R]
  Operand p;        // [M, rank]
  void* s;          // [M, s_cols]
  int64_t s_stride;
  int32_t s_cols;
  void* s_copy;  // [M, rank] or null
  int64_t s_copy_stride;
  int32_t rank;
  float* partial;  // [programs, C, R]
};

// Writes element (m, r) of S; zero beyond the rank, where an infinity in `tall` times the padding
// would be a NaN.
template <class T>
__device__ __forceinline__ void store_s(const ThinParameters& t, int64_t m, int r, float value) {
  if (m >= t.tall.rows) return;
  const T rounded = from_float<T>(r < t.rank ? value : 0.0f);
  if (r < t.s_cols) static_cast<T*>(t.s)[m * t.s_stride + r] = rounded;
  if (t.s_copy != nullptr && r < t.rank)
    static_cast<T*>(t.s_copy)[m * t.s_copy_stride + r] = rounded;
}

// A warp's rows of one tile's tall^T·P into the block's own partial sum. Row blocks after the first
// add to what this same thread stored.
template <class Config>
__device__ __forceinline__ void store_partial(const ThinParameters& t,
                                              const float (&part)[Config::kRank / 8][4], int tile,
                                              bool first_row_block) {
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int64_t first = static_cast<int64_t>(tile) * Config::kCols + warp * 16;
#pragma unroll
  for (int j = 0; j < Config::kRank / 8; ++j) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t c = first + accumulator_row(lane, half * 2);
      if (c >= t.tall.cols) continue;
      float2* const to =
          reinterpret_cast<float2*>(t.partial + (blockIdx.x * t.tall.cols + c) * Config::kRank +
                                    j * 8 + accumulator_col(lane, 0));
      float2 sum = make_float2(part[j][half * 2], part[j][half * 2 + 1]);
      if (!first_row_block) {
        const float2 before = *to;
        sum.x += before.x;
        sum.y += before.y;
      }
      *to = sum;
    }
  }
}

template <class T, class Config, bool kGrad>
__global__ void __launch_bounds__(Config::kThreads)
    thin_kernel(const __grid_constant__ ThinParameters t) {
#if __CUDA_ARCH__ >= 800
  constexpr int kRank = Config::kRank;
  const uint32_t smem = smem_address(dynamic_smem());
  const uint32_t p_tile = smem + Config::kSmemBytes;
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int tiles = static_cast<int>(ceil_div(t.tall.cols, Config::kCols));
  const int64_t blocks = ceil_div(t.tall.rows, Config::kRows);

  for (int64_t block = blockIdx.x; block < blocks; block += gridDim.x) {
    const int64_t row = block * Config::kRows;
    const auto load = [&](int tile, uint32_t to) {
      const int64_t c = static_cast<int64_t>(tile) * Config::kCols;
      load_tile<T, Config::kRows, Config::kCols, Config::kThreads>(to, t.tall, row, c);
      load_tile<T, Config::kCols, kRank, Config::kThreads>(to + Config::kTallElements * 2,
                                                           t.thin_in, c, 0);
    };
    // The previous row block's readers are done with what is loaded now.
    __syncthreads();
    if constexpr (kGrad) load_tile<T, Config::kRows, kRank, Config::kThreads>(p_tile, t.p, row, 0);
    prefetch<Config>(smem, tiles, load);
    float s[kRank / 8][4] = {};
    for (int tile = 0; tile < tiles; ++tile) {
      const uint32_t tall_tile = next_stage<Config>(smem, tile, tiles, load);
      add_product<T, Config, false>(s, tall_tile, tall_tile + Config::kTallElements * 2);
      if constexpr (kGrad) {
        float part[kRank / 8][4] = {};
        add_product<T, Config, true>(part, tall_tile, p_tile);
        store_partial<Config>(t, part, tile, block == blockIdx.x);
      }
    }
#pragma unroll
    for (int j = 0; j < kRank / 8; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        store_s<T>(t, row + warp * 16 + accumulator_row(lane, e), j * 8 + accumulator_col(lane, e),
                   s[j][e]);
  }
  wait_copies<0>();
#endif
}

template <class T, int kRank, bool kGrad>
cudaError_t launch_thin_as(const ThinParameters& parameters, int64_t programs,
                           cudaStream_t stream) {
  using Config = PassConfig<kRank>;
  return launch_with_smem<thin_kernel<T, Config, kGrad>>(
      dim3(static_cast<unsigned>(programs)), Config::kThreads,
      kGrad ? Config::kGradSmemBytes : Config::kSmemBytes, stream, parameters);
}

}  // namespace

cudaError_t launch_thin(const ThinArguments& t, int rank_padded, cudaStream_t stream) {
  ThinParameters parameters{};
  parameters.tall = operand(t.tall);
  parameters.thin_in = operand(t.thin_in);
  parameters.p = operand(t.p);
  parameters.s = t.s.data;
  parameters.s_stride = t.s.stride;
  parameters.s_cols = static_cast<int32_t>(t.s.cols);
  parameters.s_copy = t.s_copy.data;
  parameters.s_copy_stride = t.s_copy.stride;
  parameters.rank = t.rank;
  parameters.partial = t.partial;
  return for_dtype_and_rank(t.dtype, rank_padded, [&]<class T, int kRank>() {
    if (t.partial == nullptr)
      return launch_thin_as<T, kRank, false>(parameters, t.programs, stream);
    if constexpr (one_pass_gradient(kRank))
      return launch_thin_as<T, kRank, true>(parameters, t.programs, stream);
    return cudaErrorInvalidValue;
  });
}

}  // namespace efft_kernels::cuda
