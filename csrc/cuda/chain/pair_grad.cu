#include "chain/rows.cuh"
#include "common/launchers.h"
#include "common/tile.cuh"

// Partial sums of d_down = x^T·S and d_B = dY^T·P, with S = dY·B and P = x·down, which nobody else
// reads: both thin gradients of a linear whose weight is merged, in one pass over its x and dY.
//
// A warp copies its own columns of a tile of 16 rows of either matrix for itself. All products are
// made transposed: the sum of P^T or S^T over the warps is then operand a of the second product as
// its accumulators lie. The tile stays in shared memory between the two, and what a block adds up
// in its registers until its last tile.
namespace efft_kernels::cuda {
namespace {

struct PairGradParameters {
  const void* x;     // [M, K]
  const void* dy;    // [M, K]
  const void* down;  // [K, rank]
  const void* b;     // [K, rank]
  float* d_down;     // [programs, K, R]
  float* d_b;        // [programs, K, R]
  int64_t rows;
  int32_t width, rank;
};

constexpr int kSteps = kChainCols / 16;  // of 16 of a warp's columns

// Operand a of thin^T·tall^T: ranks lane / 4 and that + 8, this warp's columns.
template <class T>
__device__ __forceinline__ void load_thin(uint32_t (&a)[kSteps][4], const PairGradParameters& p,
                                          const void* thin) {
  const int lane = threadIdx.x % 32;
  const int64_t first_col = threadIdx.x / 32 * kChainCols + lane % 4 * 2;
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int r = lane / 4 + i % 2 * 8;
      const int64_t c = first_col + step * 16 + i / 2 * 8;
      a[step][i] = pack_elements(thin_at<T>(thin, c, p.width, r, p.rank),
                                 thin_at<T>(thin, c + 1, p.width, r, p.rank));
    }
  }
}

// This warp's columns of a tile's rows, swizzled; zeros beyond the matrix.
template <class T>
__device__ __forceinline__ void copy_columns(uint32_t to, const void* from, int64_t row,
                                             const PairGradParameters& p) {
  constexpr int kChunks = kChainCols / 8;  // of a row
  const int lane = threadIdx.x % 32;
  const int chunk = lane % kChunks;
  const T* const columns = static_cast<const T*>(from) + threadIdx.x / 32 * kChainCols + chunk * 8;
#pragma unroll
  for (int i = 0; i < kPairRows * kChunks / 32; ++i) {
    const int r = i * (32 / kChunks) + lane / kChunks;
    const bool inside = row + r < p.rows;
    copy_async(to + 2 * swizzled<kChainCols>(r, chunk), columns + (inside ? row + r : 0) * p.width,
               inside ? 16 : 0);
  }
}

// thin^T·tall^T over this warp's columns: ranks down, the tile's rows along, 8 to a block.
template <class T>
__device__ __forceinline__ void project(float (&product)[2][4], const uint32_t (&thin)[kSteps][4],
                                        uint32_t tile) {
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    uint32_t tall[4];
    load_b_from_rows<kChainCols>(tall, tile, 0, step * 16);
    mma<T>(product[0], thin[step], tall[0], tall[1]);
    mma<T>(product[1], thin[step], tall[2], tall[3]);
  }
}

// += thin^T·tall over the tile's rows: ranks down, this warp's columns along, 8 to a block.
template <class T>
__device__ __forceinline__ void accumulate(float (&sum)[kChainCols / 8][4], const uint4& thin,
                                           uint32_t tile) {
  const uint32_t a[4] = {thin.x, thin.y, thin.z, thin.w};
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    uint32_t tall[4];
    load_b_from_cols<kChainCols>(tall, tile, step * 16, 0);
    mma<T>(sum[2 * step], a, tall[0], tall[1]);
    mma<T>(sum[2 * step + 1], a, tall[2], tall[3]);
  }
}

__device__ __forceinline__ void store_sum(float* partial, const float (&sum)[kChainCols / 8][4]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int block = 0; block < kChainCols / 8; ++block) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int c = threadIdx.x / 32 * kChainCols + block * 8 + accumulator_col(lane, e);
      partial[c * kChainRank + accumulator_row(lane, e)] = sum[block][e];
    }
  }
}

template <class T, int kThreads>
__global__ void __launch_bounds__(kThreads)
    pair_grad_kernel(const __grid_constant__ PairGradParameters p) {
#if __CUDA_ARCH__ >= 800
  const int warps = blockDim.x / 32;
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  uint8_t* const smem = dynamic_smem();
  const uint32_t stages = smem_address(smem) + warp * kPairStages * 2 * kPairTileBytes;
  // Of each warp P^T and S^T over its columns, [8, 32] pairs of neighbouring rows; then of all.
  float2* const parts = reinterpret_cast<float2*>(smem + warps * kPairStages * 2 * kPairTileBytes);
  uint32_t* const totals = reinterpret_cast<uint32_t*>(parts + warps * 256);
  const int64_t tiles = ceil_div(p.rows, kPairRows);

  const auto load = [&](int64_t tile, int stage) {
    if (tile < tiles) {
      const uint32_t to = stages + stage * 2 * kPairTileBytes;
      copy_columns<T>(to, p.x, tile * kPairRows, p);
      copy_columns<T>(to + kPairTileBytes, p.dy, tile * kPairRows, p);
    }
    commit_copies();
  };
#pragma unroll
  for (int i = 0; i < kPairStages - 1; ++i) load(blockIdx.x + i * int64_t{gridDim.x}, i);

  uint32_t down[kSteps][4], b[kSteps][4];
  load_thin<T>(down, p, p.down);
  load_thin<T>(b, p, p.b);
  float d_down[kChainCols / 8][4] = {}, d_b[kChainCols / 8][4] = {};
  int stage = 0;
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    wait_copies<kPairStages - 2>();
    __syncwarp();  // all lanes' copies are there, and the stage before has been read by all
    load(tile + (kPairStages - 1) * int64_t{gridDim.x}, stage == 0 ? kPairStages - 1 : stage - 1);

    const uint32_t x = stages + stage * 2 * kPairTileBytes;
    const uint32_t dy = x + kPairTileBytes;
    float part[2][2][4] = {};  // P^T, S^T
    project<T>(part[0], down, x);
    project<T>(part[1], b, dy);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float (&four)[4] = part[i / 4][i / 2 % 2];
      parts[(warp * 8 + i) * 32 + lane] = make_float2(four[i % 2 * 2], four[i % 2 * 2 + 1]);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < 256; i += blockDim.x) {
      float2 sum = parts[i];
      for (int w = 1; w < warps; ++w) {
        const float2 other = parts[w * 256 + i];
        sum.x += other.x, sum.y += other.y;
      }
      // The four registers of a lane side by side, of P^T and then of S^T.
      totals[i / 128 * 128 + i % 32 * 4 + i / 32 % 4] = pack<T>(sum.x, sum.y);
    }
    __syncthreads();
    const uint4* const operands = reinterpret_cast<const uint4*>(totals);
    accumulate<T>(d_down, operands[32 + lane], x);
    accumulate<T>(d_b, operands[lane], dy);
    stage = stage == kPairStages - 1 ? 0 : stage + 1;
  }
  wait_copies<0>();
  const int64_t from = int64_t{blockIdx.x} * p.width * kChainRank;
  store_sum(p.d_down + from, d_down);
  store_sum(p.d_b + from, d_b);
#endif
}

}  // namespace

cudaError_t launch_pair_grad(const PairGradArguments& a, cudaStream_t stream) {
  const PairGradParameters parameters{
      a.x, a.dy, a.down, a.b, a.d_down, a.d_b, a.rows, static_cast<int32_t>(a.width), a.rank};
  const dim3 grid(static_cast<unsigned>(a.programs));
  const int threads = chain_threads(a.width);
  return for_width<kChainMoreThreads>(a.width, [&]<int kThreads>() {
    const int smem = pair_smem(threads / 32);
    constexpr int most = pair_smem(kThreads / 32);
    return a.dtype == Dtype::kHalf ? launch_with_up_to<pair_grad_kernel<__half, kThreads>>(
                                         most, grid, threads, smem, stream, parameters)
                                   : launch_with_up_to<pair_grad_kernel<__nv_bfloat16, kThreads>>(
                                         most, grid, threads, smem, stream, parameters);
  });
}

}  // namespace efft_kernels::cuda
