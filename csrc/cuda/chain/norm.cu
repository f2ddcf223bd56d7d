#include "chain/rows.cuh"
#include "common/launchers.h"

// z' = z + y, its LayerNorm x̂ and P = x̂·down in one pass.
//
// A lane has row lane / 4 of a tile, and in each 16 columns the four from 4·(lane % 4) on: of those
// x̂ is operand b of down^T·x̂^T as it is. The statistics are those of every warp's 64 columns, put
// together by Chan's formula, so that nothing cancels whatever the mean is.
namespace efft_kernels::cuda {
namespace {

struct NormParameters {
  const float* z;       // [M, K]
  const void* y;        // [M, K], or null: z' is z
  const float* weight;  // [K]
  const float* bias;    // [K]
  const void* down;     // [K, rank]
  float* z_out;         // [M, K], if there is y
  void* out;            // [M, K]
  void* p;              // [M, rank]
  float* mean;          // [M]
  float* rstd;          // [M]
  int64_t rows;
  int32_t width, rank;
  float eps;
};

// The sum over the lanes that have the same row.
__device__ __forceinline__ float over_row(float v) {
  v += shuffle_xor(v, 1);
  return v + shuffle_xor(v, 2);
}

template <class T, int kThreads, int kStages>
__global__ void __launch_bounds__(kThreads) norm_kernel(const __grid_constant__ NormParameters p) {
#if __CUDA_ARCH__ >= 800
  using Stage = NormStage<false>;
  constexpr int kChunks = kChainCols / 16;
  const int warp = threadIdx.x / 32;
  const int warps = blockDim.x / 32;
  const int lane = threadIdx.x % 32;
  const int first_col = warp * kChainCols + lane % 4 * 4;
  uint8_t* const stages = dynamic_smem() + warp * kStages * Stage::kBytes;
  const uint32_t to = smem_address(stages);
  // By warp the mean and the sum of squares of each row, and the part of P; both in turn, so that
  // one barrier a tile is enough.
  float2* const statistics =
      reinterpret_cast<float2*>(dynamic_smem() + warps * kStages * Stage::kBytes);
  float* const parts = reinterpret_cast<float*>(statistics + 2 * warps * kNormRows);
  const int one_turn = warps * kNormRows * kThinRow;
  const int32_t tiles = static_cast<int32_t>(ceil_div(p.rows, kNormRows));
  const int32_t blocks = static_cast<int32_t>(gridDim.x);

  const auto load = [&](int32_t tile, int stage) {
    if (tile < tiles) {
      const int64_t row = int64_t{tile} * kNormRows;
      const uint32_t at = to + stage * Stage::kBytes;
      copy_rows<float, Stage::kWide>(at, p.z, row, p.rows, p.width);
      if (p.y != nullptr)
        copy_rows<T, Stage::kNarrow>(at + Stage::kWideBytes, p.y, row, p.rows, p.width);
    }
    commit_copies();
  };
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) load(blockIdx.x + i * blocks, i);

  float weight[kChunks][4], bias[kChunks][4];
  uint32_t down[kChunks][4];  // operand a
#pragma unroll
  for (int chunk = 0; chunk < kChunks; ++chunk) {
    const int c = first_col + chunk * 16;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      weight[chunk][j] = p.weight[c + j];
      bias[chunk][j] = p.bias[c + j];
      const int r = lane / 4 + j % 2 * 8;
      down[chunk][j] = pack_elements(thin_at<T>(p.down, c + j / 2 * 2, p.width, r, p.rank),
                                     thin_at<T>(p.down, c + j / 2 * 2 + 1, p.width, r, p.rank));
    }
  }
  int stage = 0;
  int turn = 0;
  int32_t tile = blockIdx.x;
  for (; tile < tiles; tile += blocks) {
    wait_copies<kStages - 2>();
    __syncwarp();  // all lanes' copies are there, and the stage before has been read by all
    load(tile + (kStages - 1) * blocks, stage == 0 ? kStages - 1 : stage - 1);

    // z', and the statistics of this warp's columns.
    const uint8_t* const read = stages + stage * Stage::kBytes;
    const uint8_t* const wide = read + lane / 4 * Stage::kWide + lane % 4 * 16;
    const uint8_t* const narrow =
        read + Stage::kWideBytes + lane / 4 * Stage::kNarrow + lane % 4 * 8;
    const int64_t row = int64_t{tile} * kNormRows + lane / 4;
    const int64_t at = row * p.width + first_col;
    float z[kChunks][4];
    float sum = 0;
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      const float4 from = floats_at(wide + chunk * 64);
      z[chunk][0] = from.x, z[chunk][1] = from.y, z[chunk][2] = from.z, z[chunk][3] = from.w;
      if (p.y != nullptr) {
        float y[4];
        halves_at<T>(y, narrow + chunk * 32);
#pragma unroll
        for (int j = 0; j < 4; ++j) z[chunk][j] += y[j];
        if (row < p.rows)
          *reinterpret_cast<float4*>(p.z_out + at + chunk * 16) =
              make_float4(z[chunk][0], z[chunk][1], z[chunk][2], z[chunk][3]);
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) sum += z[chunk][j];
    }
    const float own_mean = over_row(sum) * (1.0f / kChainCols);
    float squares = 0;
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float apart = z[chunk][j] - own_mean;
        squares += apart * apart;
      }
    }
    squares = over_row(squares);
    float2* const shared = statistics + turn * warps * kNormRows;
    if (lane % 4 == 0) shared[warp * kNormRows + lane / 4] = make_float2(own_mean, squares);
    __syncthreads();
    // The row's statistics.
    float mean = 0;
    for (int w = lane % 4; w < warps; w += 4) mean += shared[w * kNormRows + lane / 4].x;
    mean = over_row(mean) / static_cast<float>(warps);
    float variance = 0;
    for (int w = lane % 4; w < warps; w += 4) {
      const float2 part = shared[w * kNormRows + lane / 4];
      const float apart = part.x - mean;
      variance += part.y + kChainCols * apart * apart;
    }
    variance = over_row(variance) / static_cast<float>(p.width);
    const float rstd = 1.0f / sqrtf(variance + p.eps);
    if (warp == 0 && lane % 4 == 0 && row < p.rows) {
      p.mean[row] = mean;
      p.rstd[row] = rstd;
    }
    // x̂ and P.
    float product[4] = {};
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      float x[4];
#pragma unroll
      for (int j = 0; j < 4; ++j)
        x[j] = (z[chunk][j] - mean) * rstd * weight[chunk][j] + bias[chunk][j];
      const uint2 both = packed<T>(x);
      if (row < p.rows) *reinterpret_cast<uint2*>(static_cast<T*>(p.out) + at + chunk * 16) = both;
      mma<T>(product, down[chunk], both.x, both.y);
    }
    put_thin(parts + turn * one_turn + warp * kNormRows * kThinRow, product);
    if (tile >= blocks)
      store_thin<T, kThreads / 32>(p.p, tile - blocks, p.rows, p.rank,
                                   parts + (turn ^ 1) * one_turn);
    stage = stage == kStages - 1 ? 0 : stage + 1;
    turn ^= 1;
  }
  wait_copies<0>();
  __syncthreads();
  if (tile >= blocks)
    store_thin<T, kThreads / 32>(p.p, tile - blocks, p.rows, p.rank, parts + (turn ^ 1) * one_turn);
#endif
}

}  // namespace

cudaError_t launch_norm(const NormArguments& a, cudaStream_t stream) {
  const NormParameters parameters{a.z,    a.y,     a.weight, a.bias,
                                  a.down, a.z_out, a.out,    a.p,
                                  a.mean, a.rstd,  a.rows,   static_cast<int32_t>(a.width),
                                  a.rank, a.eps};
  const dim3 grid(static_cast<unsigned>(a.programs));
  const int warps = static_cast<int>(a.width / kChainCols);
  return for_width<kChainMostThreads>(a.width, [&]<int kThreads>() {
    constexpr int kStages = norm_stages<false>(kThreads, true);
    const int smem = norm_smem<false>(warps, kStages, true);
    constexpr int most = norm_smem<false>(kThreads / 32, kStages, true);
    return a.dtype == Dtype::kHalf
               ? launch_with_up_to<norm_kernel<__half, kThreads, kStages>>(most, grid, warps * 32,
                                                                           smem, stream, parameters)
               : launch_with_up_to<norm_kernel<__nv_bfloat16, kThreads, kStages>>(
                     most, grid, warps * 32, smem, stream, parameters);
  });
}

}  // namespace efft_kernels::cuda
