#include "common/launchers.h"
#include "passes/pass.cuh"

// The partial sums of tall^T·thin: a block per 64 columns and per split of the rows.
namespace efft_kernels::cuda {
namespace {

struct TallGradParameters {
  Operand tall;    // [M, C]
  Operand thin;    // [M, rank]
  float* partial;  // [splits, C, R]
  int64_t rows_per_split;
};

template <class T, class Config, bool kWhole>
__global__ void __launch_bounds__(Config::kThreads, 1)
    tall_grad_kernel(const __grid_constant__ TallGradParameters t) {
#if __CUDA_ARCH__ >= 800
  let_next_kernel_start();
  constexpr int kRank = Config::kRank;
  const uint32_t smem = smem_address(dynamic_smem());
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int64_t col = static_cast<int64_t>(blockIdx.x) * Config::kCols;
  const int64_t first_row = blockIdx.y * t.rows_per_split;
  const int64_t left = t.tall.rows - first_row;
  const int tiles =
      static_cast<int>(ceil_div(left < t.rows_per_split ? left : t.rows_per_split, Config::kRows));

  TileWalk<T, Config::kRows, Config::kCols, Config::kThreads, Walk::kDown, kWhole> tall(
      t.tall, first_row, col);
  TileWalk<T, Config::kRows, kRank, Config::kThreads, Walk::kDown, kWhole> thin(t.thin, first_row,
                                                                                0);
  const auto load = [&](int, uint32_t to) {
    tall.load_next(to);
    thin.load_next(to + Config::kTallElements * 2);
  };
  prefetch<Config>(smem, tiles, load);
  const Product<T, Config, true> product;
  float acc[kRank / 8][4] = {};
  for (int tile = 0; tile < tiles; ++tile) {
    const uint32_t tall_tile = next_stage<Config>(smem, tile, tiles, load);
    product.add(acc, tall_tile, tall_tile + Config::kTallElements * 2);
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

}  // namespace

cudaError_t launch_tall_grad(const TallGradArguments& t, int rank_padded, cudaStream_t stream) {
  const TallGradParameters parameters{operand(t.tall), operand(t.thin), t.partial,
                                      t.rows_per_split};
  return for_pass(t.dtype, rank_padded, parameters.tall.whole() && parameters.thin.whole(),
                  [&]<class T, int kRank, bool kWhole>() {
                    using Config = PassConfig<kRank>;
                    const dim3 grid(static_cast<unsigned>(ceil_div(t.tall.cols, Config::kCols)),
                                    static_cast<unsigned>(t.splits));
                    return launch_with_smem<tall_grad_kernel<T, Config, kWhole>>(
                        grid, Config::kThreads, Config::kSmemBytes, stream, parameters);
                  });
}

}  // namespace efft_kernels::cuda
