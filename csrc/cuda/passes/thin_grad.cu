#include "common/launchers.h"
#include "passes/pass.cuh"

// S = dY·B and the partial sums of d_B = dY^T·P in one pass over dY, at R = 16. A program reads
// blocks of 128 rows and adds each into its own partial sum.
namespace efft_kernels::cuda {
namespace {

using Config = ThinGradConfig;
constexpr int kRank = Config::kRank;
constexpr int kSteps = Config::kRows / 16;  // of d_B's product along the rows

struct ThinGradParameters {
  Operand tall;     // dY [M, C]
  Operand thin_in;  // B [C, R]
  Operand p;        // [M, rank]
  ThinOutput out;
  float* partial;  // [programs, C, R]
};

// The row block's P^T [16, rows], as operand a of d_B^T = P^T·dY: the same for all its tiles.
__device__ __forceinline__ void load_p(uint32_t (&p)[kSteps][4], uint32_t p_tile) {
#pragma unroll
  for (int step = 0; step < kSteps; ++step) load_a_from_cols<kRank>(p[step], p_tile, 0, step * 16);
}

// A warp's 8 columns of P^T·tile, [16, 8], read from this lane's address `tall` on. An ldmatrix
// takes 32 rows: two steps' operands b.
template <class T>
__device__ __forceinline__ void p_product(float (&part)[4], const uint32_t (&p)[kSteps][4],
                                          uint32_t tall) {
  float odd[4] = {};
#pragma unroll
  for (int step = 0; step < kSteps; step += 2) {
    uint32_t b[4];
    load_matrices_transposed(b, tall + step * 16 * Config::kCols * 2);
    mma<T>(part, p[step], b[0], b[1]);
    mma<T>(odd, p[step + 1], b[2], b[3]);
  }
#pragma unroll
  for (int e = 0; e < 4; ++e) part[e] += odd[e];
}

template <class T, bool kWhole>
__global__ void __launch_bounds__(Config::kThreads)
    thin_grad_kernel(const __grid_constant__ ThinGradParameters t) {
#if __CUDA_ARCH__ >= 800
  wait_for_previous_kernel();
  let_next_kernel_start();
  const uint32_t smem = smem_address(dynamic_smem());
  const uint32_t p_tile = smem + Config::kStagesBytes;
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int tiles = static_cast<int>(ceil_div(t.tall.cols, Config::kCols));
  const int64_t blocks = ceil_div(t.tall.rows, Config::kRows);
  const Product<T, Config, false> product;
  // This lane's 16 bytes of a tile's rows 0 to 31.
  const uint32_t columns = kept(2 * swizzled<Config::kCols>(lane, warp));

  for (int64_t block = blockIdx.x; block < blocks; block += gridDim.x) {
    const int64_t row = block * Config::kRows;
    const bool first = block == blockIdx.x;
    TileWalk<T, Config::kRows, Config::kCols, Config::kThreads, Walk::kRight, kWhole> tall(t.tall,
                                                                                           row, 0);
    TileWalk<T, Config::kCols, kRank, Config::kThreads, Walk::kDown, true> thin_in(t.thin_in, 0, 0);
    const auto load = [&](int, uint32_t to) {
      tall.load_next(to);
      thin_in.load_next(to + Config::kTallElements * 2);
    };
    // The previous row block's readers are done with what is loaded now.
    __syncthreads();
    load_tile<T, Config::kRows, kRank, Config::kThreads>(p_tile, t.p, row, 0);
    prefetch<Config>(smem, tiles, load);

    // This thread's first column and rank of the tile's d_B^T.
    int64_t c = warp * 8 + accumulator_col(lane, 0);
    float* to = t.partial + (blockIdx.x * t.tall.cols + c) * kRank + accumulator_row(lane, 0);
    uint32_t p[kSteps][4];
    float s[kRank / 8][4] = {};
    for (int tile = 0; tile < tiles; ++tile) {
      const uint32_t tall_tile = next_stage<Config>(smem, tile, tiles, load);
      if (tile == 0) load_p(p, p_tile);
      product.add(s, tall_tile, tall_tile + Config::kTallElements * 2);
      float part[4] = {};
      p_product<T>(part, p, tall_tile + columns);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (c + i >= t.tall.cols) continue;
        float* const column = to + i * kRank;
        // This same thread stored what the row blocks before had.
        column[0] = first ? part[i] : column[0] + part[i];
        column[8] = first ? part[i + 2] : column[8] + part[i + 2];
      }
      c += Config::kCols;
      to += Config::kCols * kRank;
    }
    store_s<T, kRank>(t.out, row + warp * 16, s);
  }
  wait_copies<0>();
#endif
}

}  // namespace

cudaError_t launch_thin_grad(const ThinGradArguments& t, cudaStream_t stream) {
  const ThinGradParameters parameters{operand(t.tall), operand(t.thin_in), operand(t.p),
                                      thin_output(t.s, {}, t.rank), t.partial};
  if (!parameters.thin_in.whole()) return cudaErrorInvalidValue;
  const auto launch = [&]<class T, bool kWhole>() {
    return launch_dependent<thin_grad_kernel<T, kWhole>>(dim3(static_cast<unsigned>(t.programs)),
                                                         Config::kThreads, Config::kSmemBytes,
                                                         stream, parameters);
  };
  const bool whole = parameters.tall.whole();
  if (t.dtype == Dtype::kHalf)
    return whole ? launch.template operator()<__half, true>()
                 : launch.template operator()<__half, false>();
  return whole ? launch.template operator()<__nv_bfloat16, true>()
               : launch.template operator()<__nv_bfloat16, false>();
}

}  // namespace efft_kernels::cuda
