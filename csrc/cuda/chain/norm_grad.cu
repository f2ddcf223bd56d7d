#include "chain/rows.cuh"
#include "common/launchers.h"

// The gradient of a LayerNorm's input with a residual, and the partial sums of d_down = x̂^T·S, in
// one pass: with n = (z - mean)·rstd and g = dout·w
//     dz = rstd·(g - Σg/K - n·Σ(g·n)/K) + residual    dy = dz in 16 bits    x̂ = n·w + b
//
// A lane has rows 2t and 2t + 1 of a tile, t = lane % 4, and in each 32 columns the four from
// 4·(lane / 4) on: pairs of rows of x̂ are then operand b of an mma as they are.
namespace efft_kernels::cuda {
namespace {

struct NormGradParameters {
  const void* dout;       // [M, K]
  const float* z;         // [M, K]
  const float* mean;      // [M]
  const float* rstd;      // [M]
  const float* weight;    // [K]
  const float* bias;      // [K]
  const float* residual;  // [M, K]
  const void* s;          // [M, rank]
  float* dz;              // [M, K]
  void* dy;               // [M, K]
  float* partial;         // [programs, K, R]
  int64_t rows;
  int32_t width, rank;
};

// What a lane needs of a tile's rows beside their elements.
struct Rows {
  float mean[2], rstd[2];
  uint32_t s[2];  // operand a of S^T·x̂: ranks lane / 4 and that + 8
};

template <class T>
__device__ __forceinline__ Rows load_rows(const NormGradParameters& p, int64_t row) {
  const int lane = threadIdx.x % 32;
  row += lane % 4 * 2;
  Rows found;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const bool inside = row + i < p.rows;
    found.mean[i] = inside ? p.mean[row + i] : 0.0f;
    found.rstd[i] = inside ? p.rstd[row + i] : 0.0f;
    const int r = lane / 4 + i * 8;
    found.s[i] = pack_elements(thin_at<T>(p.s, row, p.rows, r, p.rank),
                               thin_at<T>(p.s, row + 1, p.rows, r, p.rank));
  }
  return found;
}

// The sum over the lanes that have the same rows.
__device__ __forceinline__ float4 over_columns(float4 v) {
#pragma unroll
  for (int mask = 4; mask <= 16; mask *= 2) {
    v.x += shuffle_xor(v.x, mask);
    v.y += shuffle_xor(v.y, mask);
    v.z += shuffle_xor(v.z, mask);
    v.w += shuffle_xor(v.w, mask);
  }
  return v;
}

template <class T, int kThreads, int kStages>
__global__ void __launch_bounds__(kThreads)
    norm_grad_kernel(const __grid_constant__ NormGradParameters p) {
#if __CUDA_ARCH__ >= 800
  using Stage = NormStage<true>;
  constexpr int kBlocks = kChainCols / 32;
  const int warp = threadIdx.x / 32;
  const int warps = blockDim.x / 32;
  const int lane = threadIdx.x % 32;
  const int column = lane / 4;  // times 4, in each 32
  const int pair = lane % 4;
  uint8_t* const stages = dynamic_smem() + warp * kStages * Stage::kBytes;
  const uint32_t to = smem_address(stages);
  // Σg and Σ(g·n) of the two rows of each pair, by warp; in turn, so that one barrier a tile is
  // enough.
  float4* const sums = reinterpret_cast<float4*>(dynamic_smem() + warps * kStages * Stage::kBytes);
  const int64_t tiles = ceil_div(p.rows, kNormRows);

  const auto load = [&](int64_t tile, int stage) {
    if (tile < tiles) {
      const int64_t row = tile * kNormRows;
      const uint32_t at = to + stage * Stage::kBytes;
      copy_rows<float, Stage::kWide>(at, p.z, row, p.rows, p.width);
      copy_rows<float, Stage::kWide>(at + Stage::kWideBytes, p.residual, row, p.rows, p.width);
      copy_rows<T, Stage::kNarrow>(at + 2 * Stage::kWideBytes, p.dout, row, p.rows, p.width);
    }
    commit_copies();
  };
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) load(blockIdx.x + i * int64_t{gridDim.x}, i);

  const int first_col = warp * kChainCols + column * 4;
  float weight[kBlocks][4], bias[kBlocks][4];
#pragma unroll
  for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      weight[block][j] = p.weight[first_col + block * 32 + j];
      bias[block][j] = p.bias[first_col + block * 32 + j];
    }
  }
  float d_down[kBlocks][4][4] = {};
  Rows next = load_rows<T>(p, blockIdx.x * int64_t{kNormRows});
  int stage = 0;
  int turn = 0;
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const Rows rows = next;
    next = load_rows<T>(p, (tile + gridDim.x) * kNormRows);
    wait_copies<kStages - 2>();
    __syncwarp();  // all lanes' copies are there, and the stage before has been read by all
    load(tile + (kStages - 1) * int64_t{gridDim.x}, stage == 0 ? kStages - 1 : stage - 1);

    // g, n and d_down.
    const uint8_t* const read = stages + stage * Stage::kBytes;
    const uint8_t* const wide = read + pair * 2 * Stage::kWide + column * 16;
    const uint8_t* const narrow =
        read + 2 * Stage::kWideBytes + pair * 2 * Stage::kNarrow + column * 8;
    float g[kBlocks][2][4], n[kBlocks][2][4];
    float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float4 z = floats_at(wide + i * Stage::kWide + block * 128);
        const float from[4] = {z.x, z.y, z.z, z.w};
        halves_at<T>(g[block][i], narrow + i * Stage::kNarrow + block * 64);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          n[block][i][j] = (from[j] - rows.mean[i]) * rows.rstd[i];
          g[block][i][j] *= weight[block][j];
          (i ? sum.z : sum.x) += g[block][i][j];
          (i ? sum.w : sum.y) += g[block][i][j] * n[block][i][j];
        }
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float w = weight[block][j], b = bias[block][j];
        mma_k8<T>(d_down[block][j], rows.s,
                  pack<T>(n[block][0][j] * w + b, n[block][1][j] * w + b));
      }
    }
    // The rows' sums, over this warp's columns and then over all warps.
    sum = over_columns(sum);
    float4* const shared = sums + turn * warps * 4;
    if (column == 0) shared[warp * 4 + pair] = sum;
    __syncthreads();
    float4 total = make_float4(0, 0, 0, 0);
    for (int w = column; w < warps; w += 8) {
      const float4 part = shared[w * 4 + pair];
      total.x += part.x, total.y += part.y, total.z += part.z, total.w += part.w;
    }
    total = over_columns(total);
    // dz and dy.
    const float of_width = 1.0f / static_cast<float>(p.width);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t row = tile * kNormRows + pair * 2 + i;
      if (row >= p.rows) continue;
      const float mean_g = (i ? total.z : total.x) * of_width;
      const float mean_gn = (i ? total.w : total.y) * of_width;
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) {
        const float4 r = floats_at(wide + Stage::kWideBytes + i * Stage::kWide + block * 128);
        const float residual[4] = {r.x, r.y, r.z, r.w};
        float dz[4];
#pragma unroll
        for (int j = 0; j < 4; ++j)
          dz[j] = rows.rstd[i] * (g[block][i][j] - mean_g - n[block][i][j] * mean_gn) + residual[j];
        const int64_t at = row * p.width + first_col + block * 32;
        *reinterpret_cast<float4*>(p.dz + at) = make_float4(dz[0], dz[1], dz[2], dz[3]);
        *reinterpret_cast<uint2*>(static_cast<T*>(p.dy) + at) = packed<T>(dz);
      }
    }
    stage = stage == kStages - 1 ? 0 : stage + 1;
    turn ^= 1;
  }
  wait_copies<0>();
  float* const partial = p.partial + int64_t{blockIdx.x} * p.width * kChainRank;
#pragma unroll
  for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        // Column n of the product is that of the lane which had it as operand b.
        const int c = warp * kChainCols + block * 32 + (pair * 2 + e % 2) * 4 + j;
        partial[c * kChainRank + column + e / 2 * 8] = d_down[block][j][e];
      }
    }
  }
#endif
}

}  // namespace

cudaError_t launch_norm_grad(const NormGradArguments& a, cudaStream_t stream) {
  const NormGradParameters parameters{a.dout,
                                      a.z,
                                      a.mean,
                                      a.rstd,
                                      a.weight,
                                      a.bias,
                                      a.residual,
                                      a.s,
                                      a.dz,
                                      a.dy,
                                      a.partial,
                                      a.rows,
                                      static_cast<int32_t>(a.width),
                                      a.rank};
  const dim3 grid(static_cast<unsigned>(a.programs));
  const int warps = static_cast<int>(a.width / kChainCols);
  return for_width(a.width, [&]<int kThreads>() {
    constexpr int kStages = norm_stages<true>(kThreads);
    const int smem = norm_smem<true>(warps, kStages);
    constexpr int most = norm_smem<true>(kThreads / 32, kStages);
    return a.dtype == Dtype::kHalf
               ? launch_with_up_to<norm_grad_kernel<__half, kThreads, kStages>>(
                     most, grid, warps * 32, smem, stream, parameters)
               : launch_with_up_to<norm_grad_kernel<__nv_bfloat16, kThreads, kStages>>(
                     most, grid, warps * 32, smem, stream, parameters);
  });
}

}  // namespace efft_kernels::cuda
