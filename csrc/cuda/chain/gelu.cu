#include "chain/gelu.cuh"
#include "chain/rows.cuh"
#include "common/launchers.h"

// a = gelu(h) and P = a·down of the linear after it in one pass.
//
// A block goes over tiles of 16 whole rows, its warps each over every kWarps-th 64 columns of one;
// `down` lies in shared memory, as the lanes want it. A lane has rows lane / 4 and that + 8, and in
// each 16 columns the four from 4·(lane % 4) on: of those a is operand b of down^T·a^T as it is.
namespace efft_kernels::cuda {
namespace {

struct GeluParameters {
  const void* h;     // [M, C]
  const void* down;  // [C, rank]
  void* a;           // [M, C]
  void* p;           // [M, rank]
  int64_t rows;
  int32_t width, rank;
};

// Operand a of down^T·a^T for 16 columns from `first` on: ranks down, the columns that a lane has
// of a along.
template <class T>
__device__ __forceinline__ uint4 load_step(const GeluParameters& p, int32_t first) {
  const int lane = threadIdx.x % 32;
  const T* const down = static_cast<const T*>(p.down) + int64_t{first} * p.rank;
  uint32_t a[4];
  if (p.rank % 2 == 0) {  // two ranks at a time, at a multiple of four bytes
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int32_t c = lane / 8 * 4 + lane / 4 % 2 + i / 2 * 2, r = lane % 4 * 2 + i % 2 * 8;
      a[i] = transposed(r < p.rank ? *reinterpret_cast<const uint32_t*>(down + c * p.rank + r) : 0);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int32_t c = lane % 4 * 4 + i / 2 * 2, r = lane / 4 + i % 2 * 8;
      a[i] = pack_elements(thin_at<T>(down, c, kGeluStep, r, p.rank),
                           thin_at<T>(down, c + 1, kGeluStep, r, p.rank));
    }
  }
  return make_uint4(a[0], a[1], a[2], a[3]);
}

template <class T, int kStages>
__global__ void __launch_bounds__(kChainFewThreads)
    gelu_kernel(const __grid_constant__ GeluParameters p) {
#if __CUDA_ARCH__ >= 800
  constexpr int kSteps = kChainCols / kGeluStep;
  const int warp = threadIdx.x / 32;
  const int warps = blockDim.x / 32;
  const int lane = threadIdx.x % 32;
  const int32_t chunks = p.width / kChainCols;
  uint4* const down = reinterpret_cast<uint4*>(dynamic_smem());
  uint8_t* const stages =
      dynamic_smem() + gelu_down_bytes(p.width) + warp * kStages * kGeluValueBytes;
  const uint32_t to = smem_address(stages);
  // The warps' parts of P, in turn, so that one barrier a tile is enough.
  float* const parts = reinterpret_cast<float*>(dynamic_smem() + gelu_down_bytes(p.width) +
                                                warps * kStages * kGeluValueBytes);
  const int one_turn = warps * kGeluRows * kThinRow;
  const int32_t tiles = static_cast<int32_t>(ceil_div(p.rows, kGeluRows));
  const int32_t blocks = static_cast<int32_t>(gridDim.x);

  // What is copied next: this warp's columns of a tile, and then of the next.
  int32_t next_tile = blockIdx.x, next_chunk = warp;
  const auto load = [&](int stage) {
    if (next_tile < tiles) {
      copy_rows<T, kGeluValueRow, kGeluRows>(to + stage * kGeluValueBytes, p.h,
                                             int64_t{next_tile} * kGeluRows, p.rows, p.width,
                                             (next_chunk - warp) * kChainCols);
      next_chunk += warps;
      if (next_chunk >= chunks) next_chunk = warp, next_tile += blocks;
    }
    commit_copies();
  };
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) load(i);
  for (int32_t step = warp; step < chunks * kSteps; step += warps)
    down[step * 32 + lane] = load_step<T>(p, step * kGeluStep);
  __syncthreads();

  int stage = 0;
  int turn = 0;
  for (int32_t tile = blockIdx.x; tile < tiles; tile += blocks) {
    const int64_t first = int64_t{tile} * kGeluRows;
    const int32_t left =
        p.rows - first < kGeluRows ? static_cast<int32_t>(p.rows - first) : kGeluRows;
    float product[2][4] = {};
    for (int32_t chunk = warp; chunk < chunks; chunk += warps) {
      wait_copies<kStages - 2>();
      __syncwarp();  // all lanes' copies are there, and the stage before has been read by all
      load(stage == 0 ? kStages - 1 : stage - 1);
      const uint8_t* const read =
          stages + stage * kGeluValueBytes + lane / 4 * kGeluValueRow + lane % 4 * 8;
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        const uint4 four = down[(chunk * kSteps + step) * 32 + lane];
        const uint32_t operand[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float a[4];
          halves_at<T>(a, read + half * 8 * kGeluValueRow + step * 32);
#pragma unroll
          for (int j = 0; j < 4; ++j) a[j] = Gelu(a[j]).value;
          const uint2 both = packed<T>(a);
          const int32_t r = lane / 4 + half * 8;
          if (r < left) {
            const int32_t at = r * p.width + chunk * kChainCols + step * kGeluStep + lane % 4 * 4;
            *reinterpret_cast<uint2*>(static_cast<T*>(p.a) + first * p.width + at) = both;
          }
          mma<T>(product[half], operand, both.x, both.y);
        }
      }
      stage = stage == kStages - 1 ? 0 : stage + 1;
    }
    float* const part = parts + turn * one_turn + warp * kGeluRows * kThinRow;
    put_thin(part, product[0]);
    put_thin(part + 8 * kThinRow, product[1]);
    __syncthreads();
    store_thin<T, kChainFewThreads / 32, kGeluRows>(p.p, tile, p.rows, p.rank,
                                                    parts + turn * one_turn);
    turn ^= 1;
  }
  wait_copies<0>();
#endif
}

template <class T>
cudaError_t launch_of(const GeluParameters& parameters, const dim3& grid, cudaStream_t stream) {
  const int warps = gelu_value_warps(parameters.width);
  const auto launch = [&]<int kStages>() {
    return launch_with_up_to<gelu_kernel<T, kStages>>(kSm90SmemLimit, grid, warps * 32,
                                                      gelu_value_smem(parameters.width, kStages),
                                                      stream, parameters);
  };
  return gelu_value_smem(parameters.width, 3) <= kSm90SmemLimit ? launch.template operator()<3>()
                                                                : launch.template operator()<2>();
}

}  // namespace

cudaError_t launch_gelu(const GeluArguments& a, cudaStream_t stream) {
  const GeluParameters parameters{a.h,   a.down, a.a, a.p, a.rows, static_cast<int32_t>(a.width),
                                  a.rank};
  const dim3 grid(static_cast<unsigned>(a.programs));
  return a.dtype == Dtype::kHalf ? launch_of<__half>(parameters, grid, stream)
                                 : launch_of<__nv_bfloat16>(parameters, grid, stream);
}

}  // namespace efft_kernels::cuda
