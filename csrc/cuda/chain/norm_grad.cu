#include "chain/rows.cuh"
#include "common/launchers.h"

// The gradient of a LayerNorm's input with a residual, and the partial sums of d_down = x̂^T·S, in
// one pass: with n = (z - mean)·rstd and g = dout·w
//     dz = rstd·(g - Σg/K - n·Σ(g·n)/K) + residual    dy = dz in 16 bits    x̂ = n·w + b
// For a linear before, whose output's gradient dy is, S = dy·B and partial sums of d_B = dy^T·P.
//
// A lane has rows 2t and 2t + 1 of a tile, t = lane % 4, and in each 32 columns the four from
// 4·(lane / 4) on: pairs of rows of x̂ and dy are then operand b of an mma as they are, and the
// transposed of dy's are operand b of B^T·dy^T.
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
  // Of the linear before.
  const void* b;   // [K, rank_before]
  const void* p;   // [M, rank_before]
  void* s_before;  // [M, rank_before]
  float* sum_b;    // [programs, K, R]
  int rank_before;
};

// What a lane needs of a tile's rows beside their elements.
struct Rows {
  float mean[2], rstd[2];
  uint32_t s[2];  // operand a of S^T·x̂: ranks lane / 4 and that + 8
  uint32_t p[2];  // the same of P^T·dy
};

template <class T, bool kBefore>
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
    if constexpr (kBefore)
      found.p[i] = pack_elements(thin_at<T>(p.p, row, p.rows, r, p.rank_before),
                                 thin_at<T>(p.p, row + 1, p.rows, r, p.rank_before));
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

// `kBefore`: there is a linear before. Then, and where threads are many, there are too few
// registers to keep g and n, which are made again once the rows' sums are known.
template <class T, int kThreads, int kStages, bool kBefore>
__global__ void __launch_bounds__(kThreads)
    norm_grad_kernel(const __grid_constant__ NormGradParameters p) {
#if __CUDA_ARCH__ >= 800
  using Stage = NormStage<true>;
  constexpr int kBlocks = kChainCols / 32;
  constexpr bool kKept = !kBefore && kThreads <= kChainMoreThreads;
  const int warp = threadIdx.x / 32;
  const int warps = blockDim.x / 32;
  const int lane = threadIdx.x % 32;
  const int column = lane / 4;  // times 4, in each 32
  const int pair = lane % 4;
  uint8_t* const stages = dynamic_smem() + warp * kStages * Stage::kBytes;
  const uint32_t to = smem_address(stages);
  // Σg and Σ(g·n) of the two rows of each pair, by warp, and the parts of S; in turn, so that one
  // barrier a tile is enough.
  float4* const sums = reinterpret_cast<float4*>(dynamic_smem() + warps * kStages * Stage::kBytes);
  float* const parts = reinterpret_cast<float*>(sums + 2 * warps * 4);
  const int one_turn = warps * kNormRows * kThinRow;
  const int32_t tiles = static_cast<int32_t>(ceil_div(p.rows, kNormRows));
  const int32_t blocks = static_cast<int32_t>(gridDim.x);

  const auto load = [&](int32_t tile, int stage) {
    if (tile < tiles) {
      const int64_t row = int64_t{tile} * kNormRows;
      const uint32_t at = to + stage * Stage::kBytes;
      copy_rows<float, Stage::kWide>(at, p.z, row, p.rows, p.width);
      copy_rows<float, Stage::kWide>(at + Stage::kWideBytes, p.residual, row, p.rows, p.width);
      copy_rows<T, Stage::kNarrow>(at + 2 * Stage::kWideBytes, p.dout, row, p.rows, p.width);
    }
    commit_copies();
  };
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) load(blockIdx.x + i * blocks, i);

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
  uint32_t b[kBlocks][2][4];  // operands a of B^T·dy^T
  if constexpr (kBefore) {
#pragma unroll
    for (int block = 0; block < kBlocks; ++block)
      load_across<T>(b[block], p.b, warp * kChainCols + block * 32, p.width, p.rank_before);
  }
  float d_down[kBlocks][4][4] = {}, d_b[kBlocks][4][4] = {};
  Rows next = load_rows<T, kBefore>(p, blockIdx.x * int64_t{kNormRows});
  int stage = 0;
  int turn = 0;
  int32_t tile = blockIdx.x;
  for (; tile < tiles; tile += blocks) {
    const Rows rows = next;
    next = load_rows<T, kBefore>(p, int64_t{tile + blocks} * kNormRows);
    wait_copies<kStages - 2>();
    __syncwarp();  // all lanes' copies are there, and the stage before has been read by all
    load(tile + (kStages - 1) * blocks, stage == 0 ? kStages - 1 : stage - 1);

    const uint8_t* const read = stages + stage * Stage::kBytes;
    const uint8_t* const wide = read + pair * 2 * Stage::kWide + column * 16;
    const uint8_t* const narrow =
        read + 2 * Stage::kWideBytes + pair * 2 * Stage::kNarrow + column * 8;
    const auto make = [&](int block, int i, float (&g)[4], float (&n)[4]) {
      const float4 z = floats_at(wide + i * Stage::kWide + block * 128);
      const float from[4] = {z.x, z.y, z.z, z.w};
      halves_at<T>(g, narrow + i * Stage::kNarrow + block * 64);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        n[j] = (from[j] - rows.mean[i]) * rows.rstd[i];
        g[j] *= weight[block][j];
      }
    };
    // g, n and d_down.
    float g[kKept ? kBlocks : 1][2][4], n[kKept ? kBlocks : 1][2][4];
    float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      const int at = kKept ? block : 0;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        make(block, i, g[at][i], n[at][i]);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          (i ? sum.z : sum.x) += g[at][i][j];
          (i ? sum.w : sum.y) += g[at][i][j] * n[at][i][j];
        }
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float w = weight[block][j], shift = bias[block][j];
        mma_k8<T>(d_down[block][j], rows.s,
                  pack<T>(n[at][0][j] * w + shift, n[at][1][j] * w + shift));
      }
    }
    // The rows' sums, over this warp's columns and then over all warps.
    sum = over_columns(sum);
    float4* const shared = sums + turn * warps * 4;
    if (column == 0) shared[warp * 4 + pair] = sum;
    __syncthreads();
    float4 total = make_float4(0, 0, 0, 0);
#pragma unroll
    for (int i = 0; i < ceil_div(kThreads / 32, 8); ++i) {
      const int w = i * 8 + column;
      if (w >= warps) break;
      const float4 part = shared[w * 4 + pair];
      total.x += part.x, total.y += part.y, total.z += part.z, total.w += part.w;
    }
    total = over_columns(total);
    // dz and dy; S and d_B.
    const float of_width = 1.0f / static_cast<float>(p.width);
    const float mean_g[2] = {total.x * of_width, total.z * of_width};
    const float mean_gn[2] = {total.y * of_width, total.w * of_width};
    const int64_t first = int64_t{tile} * kNormRows;
    const int32_t left =
        p.rows - first < kNormRows ? static_cast<int32_t>(p.rows - first) : kNormRows;
    float product[4] = {};
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      const int kept = kKept ? block : 0;
      float dz[2][4];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if constexpr (!kKept) make(block, i, g[0][i], n[0][i]);
        const float4 r = floats_at(wide + Stage::kWideBytes + i * Stage::kWide + block * 128);
        const float residual[4] = {r.x, r.y, r.z, r.w};
#pragma unroll
        for (int j = 0; j < 4; ++j)
          dz[i][j] =
              rows.rstd[i] * (g[kept][i][j] - mean_g[i] - n[kept][i][j] * mean_gn[i]) + residual[j];
        if (pair * 2 + i < left) {
          const int32_t at = (pair * 2 + i) * p.width + first_col + block * 32;
          *reinterpret_cast<float4*>(p.dz + first * p.width + at) =
              make_float4(dz[i][0], dz[i][1], dz[i][2], dz[i][3]);
          *reinterpret_cast<uint2*>(static_cast<T*>(p.dy) + first * p.width + at) =
              packed<T>(dz[i]);
        }
      }
      if constexpr (kBefore) {
        uint32_t dy[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          dy[j] = pack<T>(dz[0][j], dz[1][j]);
          mma_k8<T>(d_b[block][j], rows.p, dy[j]);
        }
        mma<T>(product, b[block][0], transposed(dy[0]), transposed(dy[1]));
        mma<T>(product, b[block][1], transposed(dy[2]), transposed(dy[3]));
      }
    }
    if constexpr (kBefore) {
      put_thin(parts + turn * one_turn + warp * kNormRows * kThinRow, product);
      if (tile >= blocks)
        store_thin<T, kThreads / 32>(p.s_before, tile - blocks, p.rows, p.rank_before,
                                     parts + (turn ^ 1) * one_turn);
    }
    stage = stage == kStages - 1 ? 0 : stage + 1;
    turn ^= 1;
  }
  wait_copies<0>();
  const int64_t from = int64_t{blockIdx.x} * p.width * kChainRank;
  store_sums(p.partial + from, d_down);
  if constexpr (kBefore) {
    __syncthreads();
    if (tile >= blocks)
      store_thin<T, kThreads / 32>(p.s_before, tile - blocks, p.rows, p.rank_before,
                                   parts + (turn ^ 1) * one_turn);
    store_sums(p.sum_b + from, d_b);
  }
#endif
}

template <class T, int kThreads, bool kBefore>
cudaError_t launch_of(const NormGradParameters& parameters, const dim3& grid, int warps,
                      cudaStream_t stream) {
  constexpr int kStages = norm_stages<true>(kThreads, kBefore);
  constexpr int kMost = norm_smem<true>(kThreads / 32, kStages, kBefore);
  return launch_with_up_to<norm_grad_kernel<T, kThreads, kStages, kBefore>>(
      kMost, grid, warps * 32, norm_smem<true>(warps, kStages, kBefore), stream, parameters);
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
                                      a.rank,
                                      a.b,
                                      a.p,
                                      a.s_before,
                                      a.sum_b,
                                      a.rank_before};
  const dim3 grid(static_cast<unsigned>(a.programs));
  const int warps = static_cast<int>(a.width / kChainCols);
  const auto launch = [&]<int kThreads, bool kBefore>() {
    return a.dtype == Dtype::kHalf
               ? launch_of<__half, kThreads, kBefore>(parameters, grid, warps, stream)
               : launch_of<__nv_bfloat16, kThreads, kBefore>(parameters, grid, warps, stream);
  };
  if (a.b != nullptr) return launch.template operator()<kChainFewThreads, true>();
  return for_width<kChainMostThreads>(
      a.width, [&]<int kThreads>() { return launch.template operator()<kThreads, false>(); });
}

}  // namespace efft_kernels::cuda
