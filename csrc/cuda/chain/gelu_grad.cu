#include "chain/gelu.cuh"
#include "chain/rows.cuh"
#include "common/launchers.h"

// The gradient dh = da·gelu'(h) in da's place, and the thin products of both linears beside it:
//     partial sums of S = dh·B and d_B = dh^T·P of the linear before
//     partial sums of d_down = a^T·S of the linear after, with a = gelu(h)
//
// A block has some columns and goes over tiles of 16 rows; each of its warps has 64 columns. A lane
// has rows 2t, 2t + 1, 2t + 8 and 2t + 9 of a tile, t = lane % 4, and in each 32 columns the four
// from 4·(lane / 4) on: pairs of rows of a and dh are then operands b of an mma as they are, and
// the transposed of dh's are operands b of B^T·dh^T.
namespace efft_kernels::cuda {
namespace {

struct GeluGradParameters {
  void* da;         // [M, C]: in, and out as dh
  const void* h;    // [M, C]
  const void* s;    // [M, rank_after]
  const void* b;    // [C, rank_before]
  const void* p;    // [M, rank_before]
  float* sum_s;     // [column parts, M, R]
  float* sum_b;     // [row parts, C, R]
  float* sum_down;  // [row parts, C, R]
  int64_t rows;
  int32_t width, rank_before, rank_after;
};

// The rows from `row` on of a contiguous [rows, rank], by 8 × 8 the transposed of operand a of
// thin^T·tall.
template <class T>
__device__ __forceinline__ void load_thin_rows(uint32_t (&a)[4], const void* thin, int64_t row,
                                               int64_t rows, int32_t rank) {
  const int lane = threadIdx.x % 32;
  const T* const from = static_cast<const T*>(thin) + row * rank;
  const int32_t left = rows - row < kGeluRows ? static_cast<int32_t>(rows - row) : kGeluRows;
  const int32_t k = lane / 4, r = lane % 4 * 2;
  if (rank % 2 == 0) {  // two at a time, at a multiple of four bytes
#pragma unroll
    for (int i = 0; i < 4; ++i)
      a[i] = k + i / 2 * 8 < left && r + i % 2 * 8 < rank
                 ? *reinterpret_cast<const uint32_t*>(from + (k + i / 2 * 8) * rank + r + i % 2 * 8)
                 : 0;
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      a[i] = pack_elements(thin_at<T>(from, k + i / 2 * 8, left, r + i % 2 * 8, rank),
                           thin_at<T>(from, k + i / 2 * 8, left, r + i % 2 * 8 + 1, rank));
  }
}

template <class T>
__global__ void __launch_bounds__(kChainFewThreads)
    gelu_grad_kernel(const __grid_constant__ GeluGradParameters p) {
#if __CUDA_ARCH__ >= 800
  constexpr int kBlocks = kChainCols / 32;
  const int warp = threadIdx.x / 32;
  const int warps = blockDim.x / 32;
  const int lane = threadIdx.x % 32;
  const int column = lane / 4;  // times 4, in each 32
  const int pair = lane % 4;
  const int32_t first_col = blockIdx.x * warps * kChainCols;  // of the block
  const int32_t all = (p.width - first_col) / kChainCols;
  const int active = all < warps ? all : warps;  // those that have columns
  uint8_t* const stages = dynamic_smem() + warp * kGeluStages * kGeluStageBytes;
  const uint32_t to = smem_address(stages);
  // The warps' parts of S, in turn, so that one barrier a tile is enough.
  float* const parts =
      reinterpret_cast<float*>(dynamic_smem() + warps * kGeluStages * kGeluStageBytes);
  const int one_turn = warps * kGeluRows * kThinRow;
  const int32_t tiles = static_cast<int32_t>(ceil_div(p.rows, kGeluRows));
  const int32_t blocks = static_cast<int32_t>(gridDim.y);

  const auto load = [&](int32_t tile, int stage) {
    if (tile < tiles && warp < active) {
      const int64_t row = int64_t{tile} * kGeluRows;
      const uint32_t at = to + stage * kGeluStageBytes;
      copy_rows<T, kGeluRow, kGeluRows>(at, p.h, row, p.rows, p.width, first_col);
      copy_rows<T, kGeluRow, kGeluRows>(at + kGeluStageBytes / 2, p.da, row, p.rows, p.width,
                                        first_col);
    }
    commit_copies();
  };
#pragma unroll
  for (int i = 0; i < kGeluStages - 1; ++i) load(blockIdx.y + i * blocks, i);

  uint32_t b[kBlocks][2][4];  // operands a of B^T·dh^T
#pragma unroll
  for (int block = 0; block < kBlocks; ++block)
    load_across<T>(b[block], p.b, first_col + warp * kChainCols + block * 32, p.width,
                   p.rank_before);
  float d_down[kBlocks][4][4] = {}, d_b[kBlocks][4][4] = {};
  uint32_t next_s[4], next_p[4];
  const auto load_thin = [&](int32_t tile) {
    const int64_t row = int64_t{tile} * kGeluRows;
    load_thin_rows<T>(next_s, p.s, row, p.rows, p.rank_after);
    load_thin_rows<T>(next_p, p.p, row, p.rows, p.rank_before);
  };
  // A tile's S, from the warps' parts.
  const auto store_s = [&](int32_t tile, const float* of_warps) {
    for (int i = threadIdx.x; i < kGeluRows * kChainRank; i += blockDim.x) {
      const int64_t row = int64_t{tile} * kGeluRows + i / kChainRank;
      if (row >= p.rows) continue;
      p.sum_s[(blockIdx.x * p.rows + row) * kChainRank + i % kChainRank] =
          sum_of_warps<kChainFewThreads / 32, kGeluRows>(of_warps, i, active);
    }
  };
  load_thin(blockIdx.y);
  int stage = 0;
  int turn = 0;
  int32_t tile = blockIdx.y;
  for (; tile < tiles; tile += blocks) {
    uint32_t s[4], thin[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) s[i] = transposed(next_s[i]), thin[i] = transposed(next_p[i]);
    load_thin(tile + blocks);
    wait_copies<kGeluStages - 2>();
    __syncwarp();  // all lanes' copies are there, and the stage before has been read by all
    load(tile + (kGeluStages - 1) * blocks, stage == 0 ? kGeluStages - 1 : stage - 1);

    if (warp < active) {
      const uint8_t* const read =
          stages + stage * kGeluStageBytes + pair * 2 * kGeluRow + column * 8;
      const int64_t first = int64_t{tile} * kGeluRows;
      const int32_t left =
          p.rows - first < kGeluRows ? static_cast<int32_t>(p.rows - first) : kGeluRows;
      float product[2][4] = {};
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) {
        float a[4][4], dh[4][4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int r = i % 2 + i / 2 * 8;
          float h[4], da[4];
          halves_at<T>(h, read + r * kGeluRow + block * 64);
          halves_at<T>(da, read + kGeluStageBytes / 2 + r * kGeluRow + block * 64);
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const Gelu gelu(h[j]);
            a[i][j] = gelu.value;
            dh[i][j] = da[j] * gelu.slope;
          }
          if (pair * 2 + r < left) {
            const int32_t at =
                (pair * 2 + r) * p.width + first_col + warp * kChainCols + block * 32 + column * 4;
            *reinterpret_cast<uint2*>(static_cast<T*>(p.da) + first * p.width + at) =
                packed<T>(dh[i]);
          }
        }
        uint32_t y[2][4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          mma<T>(d_down[block][j], s, pack<T>(a[0][j], a[1][j]), pack<T>(a[2][j], a[3][j]));
          y[0][j] = pack<T>(dh[0][j], dh[1][j]);
          y[1][j] = pack<T>(dh[2][j], dh[3][j]);
          mma<T>(d_b[block][j], thin, y[0][j], y[1][j]);
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
          for (int i = 0; i < 2; ++i)
            mma<T>(product[half], b[block][i], transposed(y[half][2 * i]),
                   transposed(y[half][2 * i + 1]));
        }
      }
      float* const part = parts + turn * one_turn + warp * kGeluRows * kThinRow;
      put_thin(part, product[0]);
      put_thin(part + 8 * kThinRow, product[1]);
    }
    __syncthreads();
    store_s(tile, parts + turn * one_turn);
    stage = stage == kGeluStages - 1 ? 0 : stage + 1;
    turn ^= 1;
  }
  wait_copies<0>();
  const int64_t from = (int64_t{blockIdx.y} * p.width + first_col) * kChainRank;
  if (warp < active) {
    store_sums(p.sum_b + from, d_b);
    store_sums(p.sum_down + from, d_down);
  }
#endif
}

}  // namespace

cudaError_t launch_gelu_grad(const GeluGradArguments& a, cudaStream_t stream) {
  const GeluGradParameters parameters{
      a.da,          a.h,         a.s,        a.b,    a.p,
      a.sum_s,       a.sum_b,     a.sum_down, a.rows, static_cast<int32_t>(a.width),
      a.rank_before, a.rank_after};
  const int warps = gelu_warps(a.width);
  const dim3 grid(static_cast<unsigned>(gelu_parts(a.width)), static_cast<unsigned>(a.programs));
  constexpr int most = gelu_smem(kChainFewThreads / 32);
  const int smem = gelu_smem(warps);
  return a.dtype == Dtype::kHalf ? launch_with_up_to<gelu_grad_kernel<__half>>(
                                       most, grid, warps * 32, smem, stream, parameters)
                                 : launch_with_up_to<gelu_grad_kernel<__nv_bfloat16>>(
                                       most, grid, warps * 32, smem, stream, parameters);
}

}  // namespace efft_kernels::cuda
