#include "common/convert.cuh"
#include "common/dynamic_dtype.cuh"
#include "common/launch_kernel.cuh"
#include "common/smem.cuh"
#include "common/tile.cuh"
#include "gemm/config_sm80.h"
#include "passes/sizes.h"

// Passes over a tall matrix [M, C] beside thin ones of R columns: what the factors' gradients need.
//
//   thin        S = tall·thin_in; in the same pass, if P is given, the partial sums of tall^T·P
//   tall_grad   partial sums of tall^T·thin, split over rows
//   reduce      the second stage: the partial sums added in a fixed order, in float32
//
// Bound by memory: tiles of 64 × 64 arrive in a ring of asynchronous copies, 24 KB ahead per block.
// No atomics: the same inputs on the same device give the same bits.
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

template <class T, class Config, bool kGrad>
__global__ void __launch_bounds__(Config::kThreads)
    thin_kernel(const __grid_constant__ ThinParameters t) {
#if __CUDA_ARCH__ >= 800
  constexpr int kRank = Config::kRank;
  const uint32_t smem = smem_address(dynamic_smem());
  const uint32_t p_tile = smem + Config::kSmemBytes;
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int64_t c_count = t.tall.cols;
  const int tiles = static_cast<int>(ceil_div(c_count, Config::kCols));
  const int64_t blocks = ceil_div(t.tall.rows, Config::kRows);

  for (int64_t block = blockIdx.x; block < blocks; block += gridDim.x) {
    const int64_t row = block * Config::kRows;
    const auto load = [&](int tile) {
      const uint32_t to = smem + tile % Config::kStages * Config::kStageElements * 2;
      const int64_t c = static_cast<int64_t>(tile) * Config::kCols;
      load_tile<T, Config::kRows, Config::kCols, Config::kThreads>(to, t.tall, row, c);
      load_tile<T, Config::kCols, kRank, Config::kThreads>(to + Config::kTallElements * 2,
                                                           t.thin_in, c, 0);
    };
    // The previous row block's readers are done with what is loaded now.
    __syncthreads();
    if constexpr (kGrad) load_tile<T, Config::kRows, kRank, Config::kThreads>(p_tile, t.p, row, 0);
#pragma unroll
    for (int tile = 0; tile < Config::kStages - 1; ++tile) {
      if (tile < tiles) load(tile);
      commit_copies();
    }
    float s[kRank / 8][4] = {};
    for (int tile = 0; tile < tiles; ++tile) {
      wait_copies<Config::kStages - 2>();
      __syncthreads();
      if (tile + Config::kStages - 1 < tiles) load(tile + Config::kStages - 1);
      commit_copies();

      const uint32_t tall_tile = smem + tile % Config::kStages * Config::kStageElements * 2;
      const uint32_t thin_tile = tall_tile + Config::kTallElements * 2;
      // A warp takes 16 rows of S, and 16 rows (columns of tall) of tall^T·P.
#pragma unroll
      for (int k = 0; k < Config::kCols; k += 16) {
        uint32_t a[4];
        load_a_from_rows<Config::kCols>(a, tall_tile, warp * 16, k);
#pragma unroll
        for (int r = 0; r < kRank; r += 16) {
          uint32_t b[4];
          load_b_from_cols<kRank>(b, thin_tile, r, k);
          mma<T>(s[r / 8], a, b[0], b[1]);
          mma<T>(s[r / 8 + 1], a, b[2], b[3]);
        }
      }
      if constexpr (kGrad) {
        float part[kRank / 8][4] = {};
#pragma unroll
        for (int k = 0; k < Config::kRows; k += 16) {
          uint32_t a[4];
          load_a_from_cols<Config::kCols>(a, tall_tile, warp * 16, k);
#pragma unroll
          for (int r = 0; r < kRank; r += 16) {
            uint32_t b[4];
            load_b_from_cols<kRank>(b, p_tile, r, k);
            mma<T>(part[r / 8], a, b[0], b[1]);
            mma<T>(part[r / 8 + 1], a, b[2], b[3]);
          }
        }
        // Later row blocks add to what this same thread stored.
        const int64_t first = static_cast<int64_t>(tile) * Config::kCols + warp * 16;
#pragma unroll
        for (int j = 0; j < kRank / 8; ++j) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int64_t c = first + accumulator_row(lane, half * 2);
            if (c >= c_count) continue;
            float2* const to = reinterpret_cast<float2*>(
                t.partial + (blockIdx.x * c_count + c) * kRank + j * 8 + accumulator_col(lane, 0));
            float2 sum = make_float2(part[j][half * 2], part[j][half * 2 + 1]);
            if (block != blockIdx.x) {
              const float2 before = *to;
              sum.x += before.x;
              sum.y += before.y;
            }
            *to = sum;
          }
        }
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

struct TallGradParameters {
  Operand tall;    // [M, C]
  Operand thin;    // [M, rank]
  float* partial;  // [splits, C, R]
  int64_t rows_per_split;
};

template <class T, class Config>
__global__ void __launch_bounds__(Config::kThreads)
    tall_grad_kernel(const __grid_constant__ TallGradParameters t) {
#if __CUDA_ARCH__ >= 800
  constexpr int kRank = Config::kRank;
  const uint32_t smem = smem_address(dynamic_smem());
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int64_t col = static_cast<int64_t>(blockIdx.x) * Config::kCols;
  const int64_t first_row = blockIdx.y * t.rows_per_split;
  const int64_t left = t.tall.rows - first_row;
  const int tiles =
      static_cast<int>(ceil_div(left < t.rows_per_split ? left : t.rows_per_split, Config::kRows));

  const auto load = [&](int tile) {
    const uint32_t to = smem + tile % Config::kStages * Config::kStageElements * 2;
    const int64_t row = first_row + static_cast<int64_t>(tile) * Config::kRows;
    load_tile<T, Config::kRows, Config::kCols, Config::kThreads>(to, t.tall, row, col);
    load_tile<T, Config::kRows, kRank, Config::kThreads>(to + Config::kTallElements * 2, t.thin,
                                                         row, 0);
  };
#pragma unroll
  for (int tile = 0; tile < Config::kStages - 1; ++tile) {
    if (tile < tiles) load(tile);
    commit_copies();
  }
  float acc[kRank / 8][4] = {};
  for (int tile = 0; tile < tiles; ++tile) {
    wait_copies<Config::kStages - 2>();
    __syncthreads();
    if (tile + Config::kStages - 1 < tiles) load(tile + Config::kStages - 1);
    commit_copies();

    const uint32_t tall_tile = smem + tile % Config::kStages * Config::kStageElements * 2;
    const uint32_t thin_tile = tall_tile + Config::kTallElements * 2;
#pragma unroll
    for (int k = 0; k < Config::kRows; k += 16) {
      uint32_t a[4];
      load_a_from_cols<Config::kCols>(a, tall_tile, warp * 16, k);
#pragma unroll
      for (int r = 0; r < kRank; r += 16) {
        uint32_t b[4];
        load_b_from_cols<kRank>(b, thin_tile, r, k);
        mma<T>(acc[r / 8], a, b[0], b[1]);
        mma<T>(acc[r / 8 + 1], a, b[2], b[3]);
      }
    }
  }
  wait_copies<0>();
#pragma unroll
  for (int j = 0; j < kRank / 8; ++j) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t c = col + warp * 16 + accumulator_row(lane, half * 2);
      if (c >= t.tall.cols) continue;
      *reinterpret_cast<float2*>(t.partial + (blockIdx.y * t.tall.cols + c) * kRank + j * 8 +
                                 accumulator_col(lane, 0)) =
          make_float2(acc[j][half * 2], acc[j][half * 2 + 1]);
    }
  }
#endif
}

constexpr int kReduceQuads = 32;  // float4 columns of a block
constexpr int kReduceLanes = 8;   // threads that share the parts of one column

__global__ void __launch_bounds__(kReduceQuads* kReduceLanes)
    reduce_kernel(const __grid_constant__ ReduceArguments a,
                  const __grid_constant__ ReduceArguments b, int64_t blocks_a) {
  __shared__ float4 sums[kReduceLanes][kReduceQuads];
  const bool first = blockIdx.x < blocks_a;
  const ReduceArguments& job = first ? a : b;
  const int64_t block = first ? blockIdx.x : blockIdx.x - blocks_a;
  const int quad = threadIdx.x % kReduceQuads;
  const int lane = threadIdx.x / kReduceQuads;
  const int64_t size = job.c * job.rank_padded;
  const int64_t at = (block * kReduceQuads + quad) * 4;
  float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  if (at < size) {
#pragma unroll 4
    for (int64_t part = lane; part < job.parts; part += kReduceLanes) {
      const float4 value = *reinterpret_cast<const float4*>(job.partial + part * size + at);
      sum.x += value.x;
      sum.y += value.y;
      sum.z += value.z;
      sum.w += value.w;
    }
  }
  sums[lane][quad] = sum;
  __syncthreads();
  if (lane != 0 || at >= size) return;
#pragma unroll
  for (int other = 1; other < kReduceLanes; ++other) {
    const float4 value = sums[other][quad];
    sum.x += value.x;
    sum.y += value.y;
    sum.z += value.z;
    sum.w += value.w;
  }
  const float values[4] = {sum.x, sum.y, sum.z, sum.w};
  const int64_t c = at / job.rank_padded;
  const int r = static_cast<int>(at % job.rank_padded);
#pragma unroll
  for (int e = 0; e < 4; ++e)
    if (r + e < job.rank) store_from_float(job.out, job.out_dtype, c * job.rank + r + e, values[e]);
}

template <class T, int kRank, bool kGrad>
cudaError_t launch_thin_as(const ThinParameters& parameters, int64_t programs,
                           cudaStream_t stream) {
  using Config = PassConfig<kRank>;
  constexpr int kBytes = kGrad ? Config::kGradSmemBytes : Config::kSmemBytes;
  auto* const kernel = thin_kernel<T, Config, kGrad>;
  static std::atomic<uint64_t> prepared{0};
  if (const cudaError_t error = allow_smem(kernel, kBytes, prepared); error != cudaSuccess)
    return error;
  return launch_kernel(kernel, dim3(static_cast<unsigned>(programs)), Config::kThreads, kBytes,
                       stream, parameters);
}

template <class T>
cudaError_t launch_thin_as(const ThinParameters& p, int64_t programs, int rank_padded, bool grad,
                           cudaStream_t stream) {
  switch (rank_padded) {
    case 16:
      return grad ? launch_thin_as<T, 16, true>(p, programs, stream)
                  : launch_thin_as<T, 16, false>(p, programs, stream);
    case 32:
      return grad ? launch_thin_as<T, 32, true>(p, programs, stream)
                  : launch_thin_as<T, 32, false>(p, programs, stream);
    case 64:
      return grad ? cudaErrorInvalidValue : launch_thin_as<T, 64, false>(p, programs, stream);
    case 128:
      return grad ? cudaErrorInvalidValue : launch_thin_as<T, 128, false>(p, programs, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

template <class T, int kRank>
cudaError_t launch_tall_grad_as(const TallGradArguments& t, cudaStream_t stream) {
  using Config = PassConfig<kRank>;
  auto* const kernel = tall_grad_kernel<T, Config>;
  static std::atomic<uint64_t> prepared{0};
  if (const cudaError_t error = allow_smem(kernel, Config::kSmemBytes, prepared);
      error != cudaSuccess)
    return error;
  const TallGradParameters parameters{operand(t.tall), operand(t.thin), t.partial,
                                      t.rows_per_split};
  const dim3 grid(static_cast<unsigned>(ceil_div(t.tall.cols, Config::kCols)),
                  static_cast<unsigned>(t.splits));
  return launch_kernel(kernel, grid, Config::kThreads, Config::kSmemBytes, stream, parameters);
}

template <class T>
cudaError_t launch_tall_grad_as(const TallGradArguments& t, int rank_padded, cudaStream_t stream) {
  switch (rank_padded) {
    case 16:
      return launch_tall_grad_as<T, 16>(t, stream);
    case 32:
      return launch_tall_grad_as<T, 32>(t, stream);
    case 64:
      return launch_tall_grad_as<T, 64>(t, stream);
    case 128:
      return launch_tall_grad_as<T, 128>(t, stream);
    default:
      return cudaErrorInvalidValue;
  }
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
  const bool grad = t.partial != nullptr;
  return t.dtype == Dtype::kHalf
             ? launch_thin_as<__half>(parameters, t.programs, rank_padded, grad, stream)
             : launch_thin_as<__nv_bfloat16>(parameters, t.programs, rank_padded, grad, stream);
}

cudaError_t launch_tall_grad(const TallGradArguments& t, int rank_padded, cudaStream_t stream) {
  return t.dtype == Dtype::kHalf ? launch_tall_grad_as<__half>(t, rank_padded, stream)
                                 : launch_tall_grad_as<__nv_bfloat16>(t, rank_padded, stream);
}

cudaError_t launch_reduce(const ReduceArguments& first, const ReduceArguments& second,
                          cudaStream_t stream) {
  const auto blocks = [](const ReduceArguments& r) {
    return r.parts == 0 ? int64_t{0} : ceil_div(r.c * r.rank_padded, kReduceQuads * 4);
  };
  const int64_t total = blocks(first) + blocks(second);
  if (total == 0) return cudaSuccess;
  return launch_kernel(reduce_kernel, dim3(static_cast<unsigned>(total)),
                       kReduceQuads * kReduceLanes, 0, stream, first, second, blocks(first));
}

}  // namespace efft_kernels::cuda
