#include "common/convert.cuh"
#include "common/launch_kernel.cuh"
#include "common/launchers.h"
#include "common/pipeline.cuh"
#include "common/smem.cuh"
#include "common/tile.cuh"
#include "gemm/bias.cuh"
#include "gemm/config_sm80.h"
#include "gemm/schedule.h"

// out = a·w + bias + P·thin_out^T on every GPU from sm_80 on: asynchronous copies in a ring of
// stages, ldmatrix, mma. Rows of any alignment. P is always read: the loop over I goes on over the
// rank, a's tiles from P and w's from thin_out. Tiles come in the order of TileOrder, one block
// each.
namespace efft_kernels::cuda {
namespace {

struct Sm80Parameters {
  TileOrder order;
  Operand a, w, p, thin_out;
  void* out;  // [M, C]
  int64_t out_stride;
  bool out_aligned;
  int64_t m, c;
  int32_t tiles_i, tiles_rank;
  Bias bias;
};

template <class T, class Config, WLayout kLayout>
__global__ void __launch_bounds__(Config::kThreads)
    low_rank_gemm_sm80_kernel(const __grid_constant__ Sm80Parameters g) {
#if __CUDA_ARCH__ >= 800
  constexpr int kBlockM = Config::kBlockM;
  constexpr int kBlockC = Config::kBlockC;
  constexpr int kBlockI = Config::kBlockI;
  constexpr int kThreads = Config::kThreads;
  constexpr bool kRowsOfI = kLayout == WLayout::kRowsOfI;
  constexpr int kMmaM = Config::kWarpM / 16;
  constexpr int kMmaC = Config::kWarpC / 8;

  const uint32_t smem = smem_address(dynamic_smem());
  const Tile tile = g.order.at(blockIdx.x);
  const int64_t row = static_cast<int64_t>(tile.row) * kBlockM;
  const int64_t col = static_cast<int64_t>(tile.col) * kBlockC;
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int warp_m = warp % Config::kWarpsM * Config::kWarpM;
  const int warp_c = warp / Config::kWarpsM * Config::kWarpC;

  const int tiles = g.tiles_i + g.tiles_rank;
  const auto load = [&](int t, uint32_t to) {
    const bool main = t < g.tiles_i;
    const int64_t i = static_cast<int64_t>(main ? t : t - g.tiles_i) * kBlockI;
    load_tile<T, kBlockM, kBlockI, kThreads>(to, main ? g.a : g.p, row, i);
    const Operand& w = main ? g.w : g.thin_out;
    const uint32_t w_to = to + kBlockM * kBlockI * 2;
    if constexpr (kRowsOfI) {
      load_tile<T, kBlockC, kBlockI, kThreads>(w_to, w, col, i);
    } else {
      load_tile<T, kBlockI, kBlockC, kThreads>(w_to, w, i, col);
    }
  };

  // Load and product, over I and then the rank.
  prefetch<Config>(smem, tiles, load);
  float acc[kMmaM][kMmaC][4] = {};
  for (int t = 0; t < tiles; ++t) {
    const uint32_t a_tile = next_stage<Config>(smem, t, tiles, load);
    const uint32_t w_tile = a_tile + kBlockM * kBlockI * 2;
#pragma unroll
    for (int k = 0; k < kBlockI; k += 16) {
      uint32_t a[kMmaM][4];
      uint32_t w[kMmaC / 2][4];
#pragma unroll
      for (int i = 0; i < kMmaM; ++i) load_a_from_rows<kBlockI>(a[i], a_tile, warp_m + i * 16, k);
#pragma unroll
      for (int j = 0; j < kMmaC / 2; ++j) {
        if constexpr (kRowsOfI) {
          load_b_from_rows<kBlockI>(w[j], w_tile, warp_c + j * 16, k);
        } else {
          load_b_from_cols<kBlockC>(w[j], w_tile, warp_c + j * 16, k);
        }
      }
#pragma unroll
      for (int i = 0; i < kMmaM; ++i)
#pragma unroll
        for (int j = 0; j < kMmaC; ++j)
          mma<T>(acc[i][j], a[i], w[j / 2][j % 2 * 2], w[j / 2][j % 2 * 2 + 1]);
    }
  }

  // The epilogue: bias, and through shared memory, so that the stores are whole rows.
  wait_copies<0>();
  __syncthreads();
  T* const staged = reinterpret_cast<T*>(dynamic_smem());
#pragma unroll
  for (int j = 0; j < kMmaC; ++j) {
    const int c = warp_c + j * 8 + accumulator_col(lane, 0);
    float bias[2];
    load_bias<T>(bias, g.bias, col + c, g.c);
#pragma unroll
    for (int i = 0; i < kMmaM; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int r = warp_m + i * 16 + accumulator_row(lane, half * 2);
        *reinterpret_cast<uint32_t*>(staged + swizzled<kBlockC>(r, c / 8) + c % 8) =
            pack<T>(acc[i][j][half * 2] + bias[0], acc[i][j][half * 2 + 1] + bias[1]);
      }
    }
  }
  __syncthreads();
  // The store.
  constexpr int kChunks = kBlockC / 8;
#pragma unroll
  for (int index = threadIdx.x; index < kBlockM * kChunks; index += kThreads) {
    const int r = index / kChunks;
    const int chunk = index % kChunks;
    const int64_t c = col + chunk * 8;
    if (row + r >= g.m || c >= g.c) continue;
    const T* const from = staged + swizzled<kBlockC>(r, chunk);
    T* const to = static_cast<T*>(g.out) + (row + r) * g.out_stride + c;
    if (g.out_aligned && c + 8 <= g.c) {
      *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
    } else {
      for (int e = 0; e < 8 && c + e < g.c; ++e) to[e] = from[e];
    }
  }
#endif
}

template <class T, int kBlock, WLayout kLayout>
cudaError_t launch(const GemmArguments& g, cudaStream_t stream) {
  using Config = Sm80Config<kBlock>;
  Sm80Parameters parameters{};
  parameters.order = tile_order(g.a.rows, g.out.cols, kBlock, kBlock);
  parameters.a = operand(g.a);
  parameters.w = operand(g.w);
  parameters.p = operand(g.p);
  parameters.thin_out = operand(g.thin_out);
  parameters.out = g.out.data;
  parameters.out_stride = g.out.stride;
  parameters.out_aligned = operand(g.out).aligned;
  parameters.m = g.a.rows;
  parameters.c = g.out.cols;
  parameters.tiles_i = static_cast<int32_t>(ceil_div(g.a.cols, Config::kBlockI));
  parameters.tiles_rank = static_cast<int32_t>(ceil_div(g.p.cols, Config::kBlockI));
  parameters.bias = bias_of(g);
  return launch_with_smem<low_rank_gemm_sm80_kernel<T, Config, kLayout>>(
      dim3(parameters.order.count()), Config::kThreads, Config::kSmemBytes, stream, parameters);
}

template <class T>
cudaError_t launch(const GemmArguments& g, int block, cudaStream_t stream) {
  const bool rows_of_i = g.layout == WLayout::kRowsOfI;
  if (block == 128)
    return rows_of_i ? launch<T, 128, WLayout::kRowsOfI>(g, stream)
                     : launch<T, 128, WLayout::kRowsOfC>(g, stream);
  return rows_of_i ? launch<T, 64, WLayout::kRowsOfI>(g, stream)
                   : launch<T, 64, WLayout::kRowsOfC>(g, stream);
}

}  // namespace

cudaError_t launch_gemm_sm80(const GemmArguments& g, int block, cudaStream_t stream) {
  return g.dtype == Dtype::kHalf ? launch<__half>(g, block, stream)
                                 : launch<__nv_bfloat16>(g, block, stream);
}

}  // namespace efft_kernels::cuda
