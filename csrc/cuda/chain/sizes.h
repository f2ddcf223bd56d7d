#pragma once

#include <cstdint>

#include "common/math.h"
#include "common/smem_limits.h"

// Sizes of the chain's kernels. A block goes over tiles of 8 or 16 whole rows; each of its warps
// has 64 columns of them, which it copies for itself.
namespace efft_kernels::cuda {

constexpr int kNormRows = 8;
constexpr int kPairRows = 16;
constexpr int kChainCols = 64;          // of a warp
constexpr int kChainRank = 16;          // R
constexpr int kChainMostThreads = 512;  // with more, registers would be spilled
constexpr int kChainMostWidth = kChainMostThreads / 32 * kChainCols;

// Whether the kernels take rows of `width` elements and a rank.
constexpr bool chain_takes(int64_t width, int64_t rank) {
  return width > 0 && width % kChainCols == 0 && width <= kChainMostWidth && rank <= kChainRank;
}

constexpr int chain_threads(int64_t width) { return static_cast<int>(width / kChainCols * 32); }

// Blocks: each goes over tiles of `tile_rows` rows in turn, about 12 warps on a multiprocessor.
constexpr int64_t chain_programs(int64_t rows, int tile_rows, int64_t width, int multiprocessors) {
  const int64_t tiles = ceil_div(rows, tile_rows);
  const int64_t together = chain_threads(width) >= 384 ? 1 : 384 / chain_threads(width);
  const int64_t most = multiprocessors * (together > 4 ? 4 : together);
  return tiles < most ? tiles : most;
}

// A warp's part of a norm's tile in shared memory, a matrix in rows that are so far apart that no
// access of the kernel's lanes meets another in a bank: in the forward a lane reads one row, in the
// backward two of every four.
template <bool kGrad>
struct NormStage {
  static constexpr int kWide = kChainCols * 4 + (kGrad ? 16 : 64);    // bytes from row to row
  static constexpr int kNarrow = kChainCols * 2 + (kGrad ? 16 : 32);  // of 16-bit elements
  static constexpr int kWideBytes = kNormRows * kWide;
  static constexpr int kNarrowBytes = kNormRows * kNarrow;
  // z and y; z, dout and the residual's gradient.
  static constexpr int kBytes = (kGrad ? 2 : 1) * kWideBytes + kNarrowBytes;
};

// Bytes that a warp needs beside its stages, twice: sums of a tile's rows; P's part.
constexpr int kNormSumBytes = 4 * 16;
constexpr int kNormPRow = 20;  // floats from one row of P to the next, for the banks
constexpr int kNormPBytes = kNormRows * kNormPRow * 4;

template <bool kGrad>
constexpr int norm_smem(int warps, int stages) {
  const int beside = kGrad ? kNormSumBytes : kNormSumBytes + kNormPBytes;
  return warps * (stages * NormStage<kGrad>::kBytes + 2 * beside);
}

// The kernels are compiled twice, for so many threads at most; the norm's with as many stages as
// there is room for.
constexpr int kChainFewThreads = 384;

template <bool kGrad>
constexpr int norm_stages(int most_threads) {
  return norm_smem<kGrad>(most_threads / 32, 3) <= kSm90SmemLimit ? 3 : 2;
}

static_assert(norm_smem<true>(kChainMostThreads / 32, 2) <= kSm90SmemLimit);

// A warp's part of a tile of x or of dY.
constexpr int kPairTileBytes = kPairRows * kChainCols * 2;
constexpr int kPairStages = 3;  // of both

// Beside its stages a warp has its part of P and S in float32; their sums are in 16 bits.
constexpr int pair_smem(int warps) {
  constexpr int kThin = 2 * kPairRows * kChainRank;
  return warps * (kPairStages * 2 * kPairTileBytes + kThin * 4) + kThin * 2;
}

static_assert(pair_smem(kChainMostThreads / 32) <= kSm90SmemLimit);

}  // namespace efft_kernels::cuda
