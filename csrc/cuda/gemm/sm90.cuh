#pragma once

#include <cute/arch/mma_sm90_gmma.hpp>
#include <cute/arch/mma_sm90_gmma_ext.hpp>
#include <type_traits>
#include <utility>

#include "common/convert.cuh"
#include "common/launch_kernel.cuh"
#include "common/ptx_sm90.cuh"
#include "common/ring.h"
#include "common/smem.cuh"
#include "common/swizzle.h"
#include "gemm/bias.cuh"
#include "gemm/config_sm90.h"
#include "gemm/schedule.h"
#include "gemm/sm90.h"

// out = a·w + bias + P·thin_out^T on Hopper. One warpgroup loads by TMA (a single thread issues),
// two multiply by wgmma, and `out` is stored once: a tile's accumulators, rounded, are kept in
// registers and go to memory while the next tile is multiplied. Where the tiles along C are even in
// number, two blocks take neighbours: of the rows of `a` that they share, each loads half for both.
//
// W, B and down are one bordered matrix, [[W, B], [down^T, 0]]. The forward multiplies by its rows,
// dX by its columns, so that for either one both thin factors lie in memory as w does:
//
//   forward   w [C, I] = W     thin_in [R, I] = down^T    thin_out [C, R] = B
//   dX        w [I, C] = W     thin_in [I, R] = B         thin_out [R, C] = down^T
//
// P read (kPCols = 0): the loop over I goes on over the rank, a's tiles from P and w's from
// thin_out. P computed in the GEMM's loop: every w tile has kPCols more columns, thin_in's, in the
// forward in the same wgmma, as one of their own reads a's tile again. After the loop their
// accumulators, rounded, are P and the left operand (in registers) of the product with one more
// tile, thin_out.
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

EFFT_WGMMA_SHARED(__nv_bfloat16, BF16, 16)
EFFT_WGMMA_BOTH(__nv_bfloat16, BF16, 128)
EFFT_WGMMA_BOTH(__nv_bfloat16, BF16, 192)
EFFT_WGMMA_SHARED(__nv_bfloat16, BF16, 144)
EFFT_WGMMA_SHARED(__nv_bfloat16, BF16, 208)
EFFT_WGMMA_SHARED(__half, F16, 16)
EFFT_WGMMA_BOTH(__half, F16, 128)
EFFT_WGMMA_BOTH(__half, F16, 192)
EFFT_WGMMA_SHARED(__half, F16, 144)
EFFT_WGMMA_SHARED(__half, F16, 208)

#undef EFFT_WGMMA_SHARED
#undef EFFT_WGMMA_BOTH

// Into the accumulators from kFirst on.
template <class Op, int kFirst, int kCount, size_t... kIndex>
__device__ __forceinline__ void wgmma_shared(float (&acc)[kCount], uint64_t a, uint64_t b,
                                             gmma::ScaleOut scale, std::index_sequence<kIndex...>) {
  Op::fma(a, b, acc[kFirst + kIndex]..., scale);
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

struct Sm90Parameters {
  TileOrder order;  // of tiles, or of pairs of neighbours along C
  int32_t cluster;  // blocks that share rows of a: 1 or 2
  int32_t m, c;
  int32_t tiles_i;     // tiles of the loop over I
  int32_t rank_steps;  // P read: 16 columns each, a power of two
  int32_t rank;
  Bias bias;
  void* p_out;  // [M, rank], written where P is computed here, or null
  int64_t p_stride;
  void* out;  // [M, C], rows aligned to 16 bytes
  int64_t out_stride;
};

// Addresses in a block's shared memory.
template <class Config>
struct Sm90Smem {
  uint32_t stages;  // tiles of a, of w and, where P is computed, of thin_in
  uint32_t pieces;  // of `out`, on their way from registers to memory: one per consumer's warp
  uint32_t full;    // barriers: a stage's tiles have arrived
  uint32_t empty;   // barriers: a stage's readers are done

  __device__ __forceinline__ explicit Sm90Smem(uint32_t first)
      : stages(first),
        pieces(stages + Config::kStages * Config::kStageBytes),
        full(pieces + Config::kStagingBytes),
        empty(full + Config::kStages * 8) {}
};

// A block's place among those that share rows of `a`.
struct Sm90Place {
  int first;   // tile, or pair of tiles
  int stride;  // from one tile of the block to the next
  int cluster, rank;

  __device__ __forceinline__ explicit Sm90Place(int cluster_)
      : first(blockIdx.x / cluster_),
        stride(gridDim.x / cluster_),
        cluster(cluster_),
        rank(cluster_ == 1 ? 0 : cluster_rank()) {}

  __device__ __forceinline__ Tile tile(const TileOrder& order, int index) const {
    const Tile tile = order.at(index);
    return {tile.row, tile.col * cluster + rank};
  }
};

// The loads of the tile of `a`, or of P, at (row, col).
template <class Config>
__device__ __forceinline__ void load_a(uint32_t to, const CUtensorMap* map, int row, int col,
                                       uint32_t barrier, const Sm90Place& place) {
  constexpr int kRows = Config::kBlockM / 2;
  if (place.cluster == 2) {
    load_box_multicast(to + place.rank * Config::kHalfABytes, map, row + place.rank * kRows, col,
                       barrier, 0b11);
  } else {
    load_box(to, map, row, col, barrier);
    load_box(to + Config::kHalfABytes, map, row + kRows, col, barrier);
  }
}

// The loads of w's tile, or of thin_out's, at (i, c).
template <class Config>
__device__ __forceinline__ void load_w(uint32_t to, const CUtensorMap* map, int i, int c,
                                       uint32_t barrier) {
  if constexpr (Config::kLayout == WLayout::kRowsOfI) {
    load_box(to, map, c, i, barrier);
  } else {
#pragma unroll
    for (int chunk = 0; chunk < Config::kBlockC / 64; ++chunk)
      load_box(to + chunk * Config::kChunkBytes, map, i, c + chunk * 64, barrier);
  }
}

// One thread, by elect_one: loads the stages of all tiles of the block, as soon as each is free: in
// both blocks of a pair, as both are written to.
template <class Config>
__device__ __forceinline__ void produce(const GemmMaps& maps, const Sm90Parameters& g,
                                        const Sm90Smem<Config>& smem, const Sm90Place& place) {
  Ring<Config::kStages> ring;
  // Until the stage is free; then what is about to be loaded into it is announced.
  const auto next_stage = [&](uint32_t bytes) {
    barrier_wait(smem.empty + ring.stage * 8, ring.parity ^ 1);
    barrier_arrive_expect(smem.full + ring.stage * 8, bytes);
    return smem.stages + ring.stage * Config::kStageBytes;
  };
  for (int index = place.first; index < g.order.count(); index += place.stride) {
    const Tile tile = place.tile(g.order, index);
    const int row = tile.row * Config::kBlockM;
    const int c = tile.col * Config::kBlockC;

    // The loop over I.
    for (int t = 0; t < g.tiles_i; ++t) {
      const int i = t * Config::kBlockI;
      const uint32_t to = next_stage(Config::kStageBytes);
      const uint32_t barrier = smem.full + ring.stage * 8;
      load_a<Config>(to, &maps.a, row, i, barrier, place);
      load_w<Config>(to + Config::kABytes, &maps.w, i, c, barrier);
      if constexpr (Config::kComputeP) {
        const uint32_t thin_in = to + Config::kABytes + Config::kWBytes;
        if constexpr (Config::kLayout == WLayout::kRowsOfI) {
          load_box(thin_in, &maps.thin_in, 0, i, barrier);
        } else {
          load_box(thin_in, &maps.thin_in, i, 0, barrier);
        }
      }
      ring.advance();
    }

    // The low-rank part: thin_out, and P where it is read.
    if constexpr (Config::kComputeP) {
      const uint32_t to = next_stage(Config::kWBytes);
      load_w<Config>(to + Config::kABytes, &maps.thin_out, 0, c, smem.full + ring.stage * 8);
      ring.advance();
    } else {
      for (int step = 0; step < g.rank_steps; step += 4) {
        const uint32_t to = next_stage(Config::kABytes + Config::kWBytes);
        const uint32_t barrier = smem.full + ring.stage * 8;
        load_a<Config>(to, &maps.p, row, step * 16, barrier, place);
        load_w<Config>(to + Config::kABytes, &maps.thin_out, step * 16, c, barrier);
        ring.advance();
      }
    }
  }
}

// P, the accumulators beyond kBlockC, rounded: into `p` as the left operand of wgmma, and to memory
// if `store`. Accumulators of 16 columns are, rounded, the left operand's registers of 16 columns.
// Zero beyond the rank: an infinity in `a` times the padding is a NaN, which must not reach the
// product.
template <class T, class Config>
__device__ __forceinline__ void round_p(uint32_t (&p)[Config::kPCols / 16][4],
                                        const float (&acc)[Config::kAccumulators],
                                        const Sm90Parameters& g, int row, bool store) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int block = 0; block < Config::kPCols / 8; ++block) {
    float value[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const bool inside = block * 8 + accumulator_col(lane, e) < g.rank;
      value[e] = inside ? acc[Config::kBlockC / 2 + block * 4 + e] : 0.0f;
    }
    p[block / 2][block % 2 * 2] = pack<T>(value[0], value[1]);
    p[block / 2][block % 2 * 2 + 1] = pack<T>(value[2], value[3]);
    if (store) {
      T* const p_out = static_cast<T*>(g.p_out);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int64_t m = row + accumulator_row(lane, e);
        const int r = block * 8 + accumulator_col(lane, e);
        if (m < g.m && r < g.rank) p_out[m * g.p_stride + r] = from_float<T>(value[e]);
      }
    }
  }
}

// A consumer's 64 rows of `out` plus bias, rounded: per piece of 64 columns the registers that
// stmatrix takes.
template <class T, class Config>
__device__ __forceinline__ void round_out(uint32_t (&out)[Config::kPieces][16],
                                          const float (&acc)[Config::kAccumulators],
                                          const BiasPairs<T, Config::kBlockC / 8>& bias) {
#pragma unroll
  for (int block = 0; block < Config::kBlockC / 8; ++block) {
    const float* const value = acc + block * 4;
    uint32_t* const to = out[block / 8] + block % 8 * 2;
    float pair[2];
    bias.value(pair, block);
    to[0] = pack<T>(value[0] + pair[0], value[1] + pair[1]);
    to[1] = pack<T>(value[2] + pair[0], value[3] + pair[1]);
  }
}

// A warp's 16 rows of a piece to (row, c) of `out`, by way of the warp's own `buffer`, so that the
// stores are of whole lines. Not by TMA: its fence, its queue behind the loads and a barrier among
// the warps would be waited for between two wgmma.
template <class T>
__device__ __forceinline__ void store_piece(const Sm90Parameters& g, const uint32_t (&piece)[16],
                                            int row, int c, uint32_t buffer) {
  const int lane = threadIdx.x % 32;
  const LaneAddress at = stored_blocks(lane);
  __syncwarp();  // the piece before has been read
#pragma unroll
  for (int block = 0; block < 8; block += 2)
    store_matrices(buffer + 2 * swizzled<64>(at.row, block + at.chunk), piece[block * 2],
                   piece[block * 2 + 1], piece[block * 2 + 2], piece[block * 2 + 3]);
  __syncwarp();
  const int chunk = lane % 8;
  const int first = row + lane / 8;
  T* const to = static_cast<T*>(g.out) + first * g.out_stride + c + chunk * 8;
#pragma unroll
  for (int r = 0; r < 16; r += 4) {
    if (first + r < g.m && c + chunk * 8 < g.c)
      *reinterpret_cast<uint4*>(to + r * g.out_stride) =
          load_shared(buffer + 2 * swizzled<64>(r + lane / 8, chunk));
  }
}

// A warpgroup: multiplies and stores 64 rows of all tiles of the block.
template <class T, class Config>
__device__ __forceinline__ void consume(const GemmMaps& maps, const Sm90Parameters& g,
                                        const Sm90Smem<Config>& smem, const Sm90Place& place,
                                        int consumer) {
  constexpr bool kRowsOfI = Config::kLayout == WLayout::kRowsOfI;
  constexpr gmma::Major kMajor = kRowsOfI ? gmma::Major::K : gmma::Major::MN;
  using Main = Wgmma<T, Config::kMmaC, kMajor>;
  using Last = Wgmma<T, Config::kBlockC, kMajor>;

  const int thread = threadIdx.x % 128;
  const int warp = thread / 32;
  const int lane = thread % 32;
  // Of 16 elements along I: 32 bytes of a line, or two slabs of lines.
  constexpr uint64_t kAStep = descriptor_step(32);
  constexpr uint64_t kWStep = descriptor_step(kRowsOfI ? 32 : 2 * kSlabBytes);
  const uint64_t a_first =
      wgmma_descriptor(smem.stages + consumer * Config::kHalfABytes, 16, kSlabBytes);
  const uint64_t w_first = wgmma_descriptor(smem.stages + Config::kABytes,
                                            kRowsOfI ? 16 : Config::kChunkBytes, kSlabBytes);
  constexpr uint64_t kThinInStep = descriptor_step(16 * 2 * kComputePRank);
  const uint64_t thin_in_first =
      wgmma_descriptor_32b(smem.stages + Config::kABytes + Config::kWBytes);
  const uint32_t buffer = smem.pieces + (consumer * 4 + warp) * Config::kPieceBytes;
  const auto release = [&](int stage) {
    if (lane < place.cluster) barrier_arrive_at(smem.empty + stage * 8, lane);
  };
  Ring<Config::kStages> ring;
  // The tile before this one, until it is stored: its rounded output.
  uint32_t out[Config::kPieces][16];
  int out_row = -1;
  int out_c = 0;
  const auto store = [&](int piece) {
    store_piece<T>(g, out[piece], out_row + warp * 16, out_c + piece * 64, buffer);
  };

  for (int index = place.first; index < g.order.count(); index += place.stride) {
    float acc[Config::kAccumulators];
    int previous = -1;

    // One wgmma group is always in flight: the stage before it is released when it is issued.
    // Straight-line per number of steps, as a condition between two wgmma would order them.
    const auto multiply = [&](auto steps, gmma::ScaleOut first) {
      barrier_wait(smem.full + ring.stage * 8, ring.parity);
      const uint64_t at = descriptor_step(ring.stage * Config::kStageBytes);
      fence_accumulators(acc);
      cute::warpgroup_arrive();
#pragma unroll
      for (int k = 0; k < decltype(steps)::value; ++k) {
        const uint64_t a = a_first + at + k * kAStep;
        const gmma::ScaleOut scale = k == 0 ? first : gmma::ScaleOut::One;
        wgmma_shared<typename Main::Shared, 0>(acc, a, w_first + at + k * kWStep, scale,
                                               std::make_index_sequence<Config::kMmaC / 2>{});
        if constexpr (Config::kPApart)
          wgmma_shared<typename Wgmma<T, Config::kPCols, kMajor>::Shared, Config::kBlockC / 2>(
              acc, a, thin_in_first + at + k * kThinInStep, scale,
              std::make_index_sequence<Config::kPCols / 2>{});
      }
      cute::warpgroup_commit_batch();
      cute::warpgroup_wait<1>();
      fence_accumulators(acc);
      if (previous >= 0) release(previous);
      previous = ring.stage;
      ring.advance();
    };
    // The product: over I, then over the rank where P is read. Between its steps the tile before is
    // stored, a piece at a time and evenly.
    int t = 0;
    const auto step = [&] {
      multiply(Steps<4>{}, t == 0 ? gmma::ScaleOut::Zero : gmma::ScaleOut::One);
      ++t;
    };
#pragma unroll
    for (int piece = 0; piece < Config::kPieces; ++piece) {
      const int end = g.tiles_i * (piece + 1) / Config::kPieces;
      if (t < end) step();
      if (out_row >= 0) store(piece);
#pragma unroll 1
      while (t < end - (piece == Config::kPieces - 1)) step();
    }
    // As the registers of `out` are free, a step ahead of its use.
    const Tile tile = place.tile(g.order, index);
    out_row = tile.row * Config::kBlockM + consumer * 64;
    out_c = tile.col * Config::kBlockC;
    BiasPairs<T, Config::kBlockC / 8> bias;
    bias.load(g.bias, out_c + accumulator_col(lane, 0), g.c);
    if (t < g.tiles_i) step();
    if constexpr (!Config::kComputeP) {
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

    // The low-rank product where P was computed here.
    if constexpr (Config::kComputeP) {
      uint32_t p[Config::kPCols / 16][4];
      round_p<T, Config>(p, acc, g, out_row + warp * 16, g.p_out != nullptr && out_c == 0);
      barrier_wait(smem.full + ring.stage * 8, ring.parity);
      const uint64_t at = descriptor_step(ring.stage * Config::kStageBytes);
      fence_accumulators(acc);
#pragma unroll
      for (int k = 0; k < Config::kPCols / 16; ++k)
#pragma unroll
        for (int e = 0; e < 4; ++e) cute::warpgroup_fence_operand(p[k][e]);
      cute::warpgroup_arrive();
#pragma unroll
      for (int k = 0; k < Config::kPCols / 16; ++k)
        wgmma_registers<typename Last::Registers>(acc, p[k], w_first + at + k * kWStep,
                                                  std::make_index_sequence<Config::kBlockC / 2>{});
      cute::warpgroup_commit_batch();
      cute::warpgroup_wait<0>();
      fence_accumulators(acc);
      release(ring.stage);
      ring.advance();
    }

    round_out<T, Config>(out, acc, bias);
  }
  if (out_row < 0) return;
#pragma unroll
  for (int piece = 0; piece < Config::kPieces; ++piece) store(piece);
}

template <class T, class Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    low_rank_gemm_sm90_kernel(const __grid_constant__ GemmMaps maps,
                              const __grid_constant__ Sm90Parameters g) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  const Sm90Smem<Config> smem(smem_address(dynamic_smem()));
  const Sm90Place place(g.cluster);
  const int warpgroup = threadIdx.x / 128;
  if (threadIdx.x == 0) {
    if (smem.stages % Config::kAlignment != 0) __trap();
    prefetch_map(&maps.a);
    prefetch_map(&maps.w);
    for (int i = 0; i < Config::kStages; ++i) {
      barrier_init(smem.full + i * 8, 1);
      barrier_init(smem.empty + i * 8, g.cluster * Config::kConsumers * 4);  // one per warp
    }
    barrier_init_fence();
  }
  cluster_sync();

  if (warpgroup == 0) {
    give_registers_back<Config::kProducerRegisters>();
    if (threadIdx.x < 32 && elect_one()) produce<Config>(maps, g, smem, place);
  } else {
    take_registers<Config::kConsumerRegisters>();
    consume<T, Config>(maps, g, smem, place, warpgroup - 1);
  }
  // The other block's arrivals need this one's barriers.
  cluster_sync();
#endif
}

template <class T, class Config>
cudaError_t launch_sm90(const GemmArguments& g, const GemmMaps& maps, const Device& device,
                        cudaStream_t stream) {
  Sm90Parameters parameters{};
  const int cluster = sm90_cluster(g.out.cols, Config::kBlockC, device.multiprocessors);
  parameters.order = tile_order(g.a.rows, g.out.cols, Config::kBlockM, Config::kBlockC * cluster);
  parameters.cluster = cluster;
  parameters.m = static_cast<int32_t>(g.a.rows);
  parameters.c = static_cast<int32_t>(g.out.cols);
  parameters.tiles_i = static_cast<int32_t>(ceil_div(g.a.cols, Config::kBlockI));
  parameters.rank = static_cast<int32_t>(g.p.cols);
  parameters.rank_steps = Config::kComputeP ? 0 : g.rank_padded / 16;
  parameters.bias = bias_of(g);
  parameters.p_out = Config::kComputeP ? g.p.data : nullptr;
  parameters.p_stride = g.p.stride;
  parameters.out = g.out.data;
  parameters.out_stride = g.out.stride;
  const int count = parameters.order.count();
  const int most = device.multiprocessors / cluster;
  return launch_clusters<low_rank_gemm_sm90_kernel<T, Config>>(
      cluster * (count < most ? count : most), cluster, Config::kThreads, Config::kSmemBytes,
      stream, maps, parameters);
}

template <class T, int kBlockC, int kPCols>
cudaError_t launch_sm90(const GemmArguments& g, const GemmMaps& maps, const Device& device,
                        cudaStream_t stream) {
  return g.layout == WLayout::kRowsOfI
             ? launch_sm90<T, Sm90Config<kBlockC, kPCols, WLayout::kRowsOfI>>(g, maps, device,
                                                                              stream)
             : launch_sm90<T, Sm90Config<kBlockC, kPCols, WLayout::kRowsOfC>>(g, maps, device,
                                                                              stream);
}

template <class T>
cudaError_t launch_sm90(const GemmArguments& g, const GemmMaps& maps, int block_c,
                        const Device& device, cudaStream_t stream) {
  const bool wide = block_c == kSm90WideBlockC;
  if (g.compute_p && g.rank_padded != kComputePRank) return cudaErrorInvalidValue;
  if (g.compute_p)
    return wide ? launch_sm90<T, kSm90WideBlockC, kComputePRank>(g, maps, device, stream)
                : launch_sm90<T, kSm90NarrowBlockC, kComputePRank>(g, maps, device, stream);
  return wide ? launch_sm90<T, kSm90WideBlockC, 0>(g, maps, device, stream)
              : launch_sm90<T, kSm90NarrowBlockC, 0>(g, maps, device, stream);
}

}  // namespace efft_kernels::cuda
