#pragma once

#include <cute/arch/mma_sm90_gmma.hpp>
#include <cute/arch/mma_sm90_gmma_ext.hpp>
#include <type_traits>
#include <utility>

#include "common/convert.cuh"
#include "common/launch_kernel.cuh"
#include "common/launchers.h"
#include "common/ptx_sm90.cuh"
#include "common/ring.h"
#include "common/smem.cuh"
#include "common/swizzle.h"

// out = a·w + bias + P·thin_out^T on Hopper: the copy engine loads, one warp issues, two warpgroups
// multiply, and `out` is stored once.
//
// W, B and down are one bordered matrix, [[W, B], [down^T, 0]]. The forward multiplies by its rows,
// dX by its columns, so that for either one both thin factors lie in memory as w does:
//
//   forward   w [C, I] = W     thin_in [R, I] = down^T    thin_out [C, R] = B
//   dX        w [I, C] = W     thin_in [I, R] = B         thin_out [R, C] = down^T
//
// P given (kRide = 0): the loop over I goes on over the rank, a's tiles from P and w's from
// thin_out. P riding: every w tile has kRide more columns, thin_in's, in the same wgmma; a wgmma of
// their own would read a's tile again. After the loop they are P, rounded, and the left operand (in
// registers) of the product with one more tile, thin_out.
namespace efft_kernels::cuda {

namespace gmma = cute::SM90::GMMA;

template <class T, int kColumns, gmma::Major kMajor>
struct Wgmma;  // ::Shared and ::Registers: where the left operand is

#define EFFT_WGMMA_SHARED(T, NAME, N)                                                  \
  template <gmma::Major kMajor>                                                        \
  struct Wgmma<T, N, kMajor> {                                                         \
    using Shared = gmma::MMA_64x##N##x16_F32##NAME##NAME##_SS<gmma::Major::K, kMajor>; \
  };
#define EFFT_WGMMA_BOTH(T, NAME, N)                                                       \
  template <gmma::Major kMajor>                                                           \
  struct Wgmma<T, N, kMajor> {                                                            \
    using Shared = gmma::MMA_64x##N##x16_F32##NAME##NAME##_SS<gmma::Major::K, kMajor>;    \
    using Registers = gmma::MMA_64x##N##x16_F32##NAME##NAME##_RS<gmma::Major::K, kMajor>; \
  };

EFFT_WGMMA_BOTH(__nv_bfloat16, BF16, 128)
EFFT_WGMMA_BOTH(__nv_bfloat16, BF16, 192)
EFFT_WGMMA_SHARED(__nv_bfloat16, BF16, 144)
EFFT_WGMMA_SHARED(__nv_bfloat16, BF16, 208)
EFFT_WGMMA_BOTH(__half, F16, 128)
EFFT_WGMMA_BOTH(__half, F16, 192)
EFFT_WGMMA_SHARED(__half, F16, 144)
EFFT_WGMMA_SHARED(__half, F16, 208)

#undef EFFT_WGMMA_SHARED
#undef EFFT_WGMMA_BOTH

template <class Op, int kCount, size_t... kIndex>
__device__ __forceinline__ void wgmma_shared(float (&acc)[kCount], uint64_t a, uint64_t b,
                                             gmma::ScaleOut scale, std::index_sequence<kIndex...>) {
  Op::fma(a, b, acc[kIndex]..., scale);
}

template <class Op, int kCount, size_t... kIndex>
__device__ __forceinline__ void wgmma_registers(float (&acc)[kCount], const uint32_t (&a)[4],
                                                uint64_t b, std::index_sequence<kIndex...>) {
  Op::fma(a[0], a[1], a[2], a[3], b, acc[kIndex]..., gmma::ScaleOut::One);
}

template <int kCount>
__device__ __forceinline__ void fence_accumulators(float (&acc)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) cute::warpgroup_fence_operand(acc[i]);
}

// Of 16 elements along the inner dim.
template <int kCount>
using Steps = std::integral_constant<int, kCount>;

struct GemmParameters {
  TileOrder order;
  int32_t m, c;
  int32_t tiles_i;     // tiles of the loop over I
  int32_t rank_steps;  // P given: 16 columns each, a power of two
  int32_t rank;
  const void* bias;  // [C] or null
  bool bias_is_float;
  void* p_out;  // [M, rank], written where P rides, or null
  int64_t p_stride;
};

template <class T, class Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    low_rank_gemm_sm90_kernel(const __grid_constant__ GemmMaps maps,
                              const __grid_constant__ GemmParameters g) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  constexpr bool kRowsOfI = Config::kLayout == WLayout::kRowsOfI;
  constexpr bool kRides = Config::kRide > 0;
  constexpr int kStages = Config::kStages;

  const uint32_t smem =
      static_cast<uint32_t>(round_up(smem_address(dynamic_smem()), Config::kAlignment));
  const uint32_t staging = smem + kStages * Config::kStageBytes;
  const uint32_t full = staging + Config::kStagingBytes;  // a tile has arrived
  const uint32_t empty = full + kStages * 8;              // its readers are done
  const int warpgroup = threadIdx.x / 128;

  if (threadIdx.x == 0) {
    prefetch_map(&maps.a);
    prefetch_map(&maps.w);
    for (int i = 0; i < kStages; ++i) {
      barrier_init(full + i * 8, 1);
      barrier_init(empty + i * 8, Config::kConsumers * 4);  // one arrival per warp
    }
    barrier_init_fence();
  }
  __syncthreads();

  const int tiles = g.order.count();
  Ring<kStages> ring;

  if (warpgroup == 0) {
    give_registers_back<Config::kProducerRegisters>();
    if (threadIdx.x == 0) {
      const auto load_w = [&](const CUtensorMap* map, uint32_t to, int i, int c, uint32_t barrier) {
        if constexpr (kRowsOfI) {
          load_box(to, map, c, i, barrier);
        } else {
#pragma unroll
          for (int chunk = 0; chunk < Config::kBlockC / 64; ++chunk)
            load_box(to + chunk * Config::kChunkBytes, map, i, c + chunk * 64, barrier);
        }
      };
      // Until the stage is free; then what is about to be loaded into it is announced.
      const auto next_stage = [&](uint32_t bytes) {
        barrier_wait(empty + ring.stage * 8, ring.parity ^ 1);
        barrier_arrive_expect(full + ring.stage * 8, bytes);
        return smem + ring.stage * Config::kStageBytes;
      };

      for (int index = blockIdx.x; index < tiles; index += gridDim.x) {
        const Tile tile = g.order.at(index);
        const int row = tile.row * Config::kBlockM;
        const int c = tile.col * Config::kBlockC;
        for (int t = 0; t < g.tiles_i; ++t) {
          const int i = t * Config::kBlockI;
          const uint32_t to = next_stage(Config::kStageBytes);
          const uint32_t barrier = full + ring.stage * 8;
          load_box(to, &maps.a, row, i, barrier);
          load_w(&maps.w, to + Config::kABytes, i, c, barrier);
          if constexpr (kRides) {
            const uint32_t ride = to + Config::kABytes + Config::kWBytes;
            if constexpr (kRowsOfI) {
              load_box(ride, &maps.thin_in, 0, i, barrier);
            } else {
              load_box(ride, &maps.thin_in, i, 0, barrier);
            }
          }
          ring.advance();
        }
        if constexpr (kRides) {
          const uint32_t to = next_stage(Config::kWBytes);
          load_w(&maps.thin_out, to + Config::kABytes, 0, c, full + ring.stage * 8);
          ring.advance();
        } else {
          for (int step = 0; step < g.rank_steps; step += 4) {
            const uint32_t to = next_stage(Config::kABytes + Config::kWBytes);
            const uint32_t barrier = full + ring.stage * 8;
            load_box(to, &maps.p, row, step * 16, barrier);
            load_w(&maps.thin_out, to + Config::kABytes, step * 16, c, barrier);
            ring.advance();
          }
        }
      }
    }
  } else {
    take_registers<Config::kConsumerRegisters>();
    constexpr gmma::Major kMajor = kRowsOfI ? gmma::Major::K : gmma::Major::MN;
    using Main = Wgmma<T, Config::kMmaC, kMajor>;
    using Last = Wgmma<T, Config::kBlockC, kMajor>;
    constexpr auto kAll = std::make_index_sequence<Config::kMmaC / 2>{};

    const int consumer = warpgroup - 1;
    const int thread = threadIdx.x % 128;
    const int warp = thread / 32;
    const int lane = thread % 32;
    // Of 16 elements along I: 32 bytes of a line, or two slabs of lines.
    constexpr uint64_t kAStep = descriptor_step(32);
    constexpr uint64_t kWStep = descriptor_step(kRowsOfI ? 32 : 2 * kSlabBytes);
    const uint64_t a_first = wgmma_descriptor(smem + consumer * 64 * kLineBytes, 16, kSlabBytes);
    const uint64_t w_first =
        wgmma_descriptor(smem + Config::kABytes, kRowsOfI ? 16 : Config::kChunkBytes, kSlabBytes);
    const uint32_t pieces = staging + consumer * 2 * Config::kPieceBytes;
    const auto release = [&](int stage) {
      if (lane == 0) barrier_arrive(empty + stage * 8);
    };
    int piece = 0;

    for (int index = blockIdx.x; index < tiles; index += gridDim.x) {
      const Tile tile = g.order.at(index);
      const int row = tile.row * Config::kBlockM + consumer * 64;
      const int c = tile.col * Config::kBlockC;
      float acc[Config::kMmaC / 2];
      int previous = -1;

      // One wgmma group is always in flight: the stage before it is released when it is issued.
      // Straight-line per number of steps, as a condition between two wgmma would order them.
      const auto multiply = [&](auto steps, gmma::ScaleOut first) {
        barrier_wait(full + ring.stage * 8, ring.parity);
        const uint64_t at = descriptor_step(ring.stage * Config::kStageBytes);
        fence_accumulators(acc);
        cute::warpgroup_arrive();
#pragma unroll
        for (int k = 0; k < decltype(steps)::value; ++k)
          wgmma_shared<typename Main::Shared>(acc, a_first + at + k * kAStep,
                                              w_first + at + k * kWStep,
                                              k == 0 ? first : gmma::ScaleOut::One, kAll);
        cute::warpgroup_commit_batch();
        cute::warpgroup_wait<1>();
        fence_accumulators(acc);
        if (previous >= 0) release(previous);
        previous = ring.stage;
        ring.advance();
      };
      for (int t = 0; t < g.tiles_i; ++t)
        multiply(Steps<4>{}, t == 0 ? gmma::ScaleOut::Zero : gmma::ScaleOut::One);
      if constexpr (!kRides) {
        if (g.rank_steps == 1) {
          multiply(Steps<1>{}, gmma::ScaleOut::One);
        } else if (g.rank_steps == 2) {
          multiply(Steps<2>{}, gmma::ScaleOut::One);
        } else {
          for (int step = 0; step < g.rank_steps; step += 4)
            multiply(Steps<4>{}, gmma::ScaleOut::One);
        }
      }
      cute::warpgroup_wait<0>();
      fence_accumulators(acc);
      release(previous);

      if constexpr (kRides) {
        // Accumulators of 16 columns are, rounded, the left operand's registers of 16 columns. An
        // infinity in `a` times the padding is a NaN; it must not reach the product.
        uint32_t p[Config::kRide / 16][4];
#pragma unroll
        for (int block = 0; block < Config::kRide / 8; ++block) {
          float value[4];
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const bool inside = block * 8 + accumulator_col(lane, e) < g.rank;
            value[e] = inside ? acc[Config::kBlockC / 2 + block * 4 + e] : 0.0f;
          }
          p[block / 2][block % 2 * 2] = pack<T>(value[0], value[1]);
          p[block / 2][block % 2 * 2 + 1] = pack<T>(value[2], value[3]);
          if (g.p_out != nullptr && c == 0) {
            T* const p_out = static_cast<T*>(g.p_out);
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              const int64_t m = row + warp * 16 + accumulator_row(lane, e);
              const int r = block * 8 + accumulator_col(lane, e);
              if (m < g.m && r < g.rank) p_out[m * g.p_stride + r] = from_float<T>(value[e]);
            }
          }
        }
        barrier_wait(full + ring.stage * 8, ring.parity);
        const uint64_t at = descriptor_step(ring.stage * Config::kStageBytes);
        fence_accumulators(acc);
#pragma unroll
        for (int k = 0; k < Config::kRide / 16; ++k)
#pragma unroll
          for (int e = 0; e < 4; ++e) cute::warpgroup_fence_operand(p[k][e]);
        cute::warpgroup_arrive();
#pragma unroll
        for (int k = 0; k < Config::kRide / 16; ++k)
          wgmma_registers<typename Last::Registers>(
              acc, p[k], w_first + at + k * kWStep,
              std::make_index_sequence<Config::kBlockC / 2>{});
        cute::warpgroup_commit_batch();
        cute::warpgroup_wait<0>();
        fence_accumulators(acc);
        release(ring.stage);
        ring.advance();
      }

      // In pieces of 64 columns through shared memory, two buffers in turn.
#pragma unroll
      for (int first = 0; first < Config::kBlockC; first += 64) {
        const uint32_t buffer = pieces + piece * Config::kPieceBytes;
        if (thread == 0) wait_stores_read<1>();
        warpgroup_sync(1 + consumer);
#pragma unroll
        for (int block = 0; block < 8; block += 2) {
          uint32_t packed[4];
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int local = first + (block + half) * 8;
            float* const value = acc + local / 2;
            const int col = c + local + accumulator_col(lane, 0);
            float bias[2] = {0.0f, 0.0f};
            if (g.bias != nullptr) {
#pragma unroll
              for (int e = 0; e < 2; ++e) {
                if (col + e < g.c)
                  bias[e] = g.bias_is_float ? static_cast<const float*>(g.bias)[col + e]
                                            : to_float(static_cast<const T*>(g.bias)[col + e]);
              }
            }
            packed[half * 2] = pack<T>(value[0] + bias[0], value[1] + bias[1]);
            packed[half * 2 + 1] = pack<T>(value[2] + bias[0], value[3] + bias[1]);
          }
          const LaneAddress at = stored_blocks(lane);
          store_matrices(buffer + 2 * swizzled<64>(warp * 16 + at.row, block + at.chunk), packed[0],
                         packed[1], packed[2], packed[3]);
        }
        fence_to_copy_engine();
        warpgroup_sync(1 + consumer);
        if (thread == 0) {
          if (row < g.m && c + first < g.c) store_box(&maps.out, row, c + first, buffer);
          commit_stores();
        }
        piece ^= 1;
      }
    }
    if (thread == 0) wait_stores_read<0>();
  }
#endif
}

template <class T, class Config>
cudaError_t launch_sm90(const GemmArguments& g, const GemmMaps& maps, const Device& device,
                        cudaStream_t stream) {
  auto* const kernel = low_rank_gemm_sm90_kernel<T, Config>;
  static std::atomic<uint64_t> prepared{0};
  if (const cudaError_t error = allow_smem(kernel, Config::kSmemBytes, prepared);
      error != cudaSuccess)
    return error;
  GemmParameters parameters{};
  parameters.order = tile_order(g.a.rows, g.out.cols, Config::kBlockM, Config::kBlockC);
  parameters.m = static_cast<int32_t>(g.a.rows);
  parameters.c = static_cast<int32_t>(g.out.cols);
  parameters.tiles_i = static_cast<int32_t>(ceil_div(g.a.cols, Config::kBlockI));
  parameters.rank = static_cast<int32_t>(g.p.cols);
  parameters.rank_steps = Config::kRide ? 0 : g.rank_padded / 16;
  parameters.bias = g.bias;
  parameters.bias_is_float = g.bias_dtype == Dtype::kFloat;
  parameters.p_out = Config::kRide ? g.p.data : nullptr;
  parameters.p_stride = g.p.stride;
  const int count = parameters.order.count();
  const int grid = count < device.multiprocessors ? count : device.multiprocessors;
  return launch_kernel(kernel, dim3(grid), Config::kThreads, Config::kSmemBytes, stream, maps,
                       parameters);
}

template <class T, int kBlockC, int kRide>
cudaError_t launch_sm90(const GemmArguments& g, const GemmMaps& maps, const Device& device,
                        cudaStream_t stream) {
  return g.layout == WLayout::kRowsOfI
             ? launch_sm90<T, Sm90Config<kBlockC, kRide, WLayout::kRowsOfI>>(g, maps, device,
                                                                             stream)
             : launch_sm90<T, Sm90Config<kBlockC, kRide, WLayout::kRowsOfC>>(g, maps, device,
                                                                             stream);
}

template <class T>
cudaError_t launch_sm90(const GemmArguments& g, const GemmMaps& maps, int block_c,
                        const Device& device, cudaStream_t stream) {
  const bool wide = block_c == kSm90WideBlockC;
  if (g.ride && g.rank_padded != 16) return cudaErrorInvalidValue;
  if (g.ride)
    return wide ? launch_sm90<T, kSm90WideBlockC, 16>(g, maps, device, stream)
                : launch_sm90<T, kSm90NarrowBlockC, 16>(g, maps, device, stream);
  return wide ? launch_sm90<T, kSm90WideBlockC, 0>(g, maps, device, stream)
              : launch_sm90<T, kSm90NarrowBlockC, 0>(g, maps, device, stream);
}

}  // namespace efft_kernels::cuda
