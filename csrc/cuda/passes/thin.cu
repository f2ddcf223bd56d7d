#include "common/launchers.h"
#include "passes/pass.cuh"

// S = tall·thin_in, rounded: a block per 64 rows.
namespace efft_kernels::cuda {
namespace {

struct ThinParameters {
  Operand tall;     // [M, C]
  Operand thin_in;  // [C, R]
  ThinOutput out;
};

template <class T, class Config, bool kWhole>
__global__ void __launch_bounds__(Config::kThreads)
    thin_kernel(const __grid_constant__ ThinParameters t) {
#if __CUDA_ARCH__ >= 800
  wait_for_previous_kernel();
  let_next_kernel_start();
  constexpr int kRank = Config::kRank;
  const uint32_t smem = smem_address(dynamic_smem());
  const int tiles = static_cast<int>(ceil_div(t.tall.cols, Config::kCols));
  const int64_t row = static_cast<int64_t>(blockIdx.x) * Config::kRows;

  TileWalk<T, Config::kRows, Config::kCols, Config::kThreads, Walk::kRight, kWhole> tall(t.tall,
                                                                                         row, 0);
  TileWalk<T, Config::kCols, kRank, Config::kThreads, Walk::kDown, true> thin_in(t.thin_in, 0, 0);
  const auto load = [&](int, uint32_t to) {
    tall.load_next(to);
    thin_in.load_next(to + Config::kTallElements * 2);
  };
  prefetch<Config>(smem, tiles, load);
  const Product<T, Config, false> product;
  float s[kRank / 8][4] = {};
  for (int tile = 0; tile < tiles; ++tile) {
    const uint32_t tall_tile = next_stage<Config>(smem, tile, tiles, load);
    product.add(s, tall_tile, tall_tile + Config::kTallElements * 2);
  }
  wait_copies<0>();
  store_s<T, kRank>(t.out, row + threadIdx.x / 32 * 16, s);
#endif
}

}  // namespace

cudaError_t launch_thin(const ThinArguments& t, int rank_padded, cudaStream_t stream) {
  const ThinParameters parameters{operand(t.tall), operand(t.thin_in),
                                  thin_output(t.s, t.s_copy, t.rank)};
  if (!parameters.thin_in.whole()) return cudaErrorInvalidValue;
  return for_pass(t.dtype, rank_padded, parameters.tall.whole(),
                  [&]<class T, int kRank, bool kWhole>() {
                    using Config = PassConfig<kRank>;
                    const int64_t blocks = ceil_div(t.tall.rows, Config::kRows);
                    return launch_dependent<thin_kernel<T, Config, kWhole>>(
                        dim3(static_cast<unsigned>(blocks)), Config::kThreads, Config::kSmemBytes,
                        stream, parameters);
                  });
}

}  // namespace efft_kernels::cuda
