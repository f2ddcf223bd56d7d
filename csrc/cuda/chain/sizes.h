#pragma once

#include <cstdint>

#include "common/host_device.h"
#include "common/math.h"
#include "common/smem_limits.h"

// Sizes of the chain's kernels. A block goes over tiles of 8 or 16 rows; each of its warps has 64
// columns of them at a time, which it copies for itself.
namespace efft_kernels::cuda {

constexpr int kNormRows = 8;
constexpr int kPairRows = 16;
constexpr int kChainCols = 64;        // of a warp
constexpr int kChainRank = 16;        // R
constexpr int kNormMostWidth = 1280;  // beyond it two stages do not fit in shared memory
constexpr int kPairMostWidth = 1024;  // beyond these, registers would be spilled
constexpr int kBeforeMostWidth = 768;
constexpr int kGeluMostWidth = 1 << 20;  // a tile's elements have indices of 32 bits

// Whether rows of `width` elements can be shared out to warps, `most` of them.
constexpr bool chain_takes(int64_t width, int64_t most) {
  return width > 0 && width % kChainCols == 0 && width <= most;
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

// Bytes that a warp needs beside its stages, twice: sums of a tile's rows; its part of P or S.
constexpr int kNormSumBytes = 4 * 16;
constexpr int kThinRow = 20;  // floats from one row of P or S to the next, for the banks
constexpr int kThinBytes = kNormRows * kThinRow * 4;

// `thin`: whether it makes P or S.
template <bool kGrad>
constexpr int norm_smem(int warps, int stages, bool thin) {
  const int beside = kNormSumBytes + (thin ? kThinBytes : 0);
  return warps * (stages * NormStage<kGrad>::kBytes + 2 * beside);
}

// The kernels are compiled for so many threads at most; the norm's with as many stages as there is
// room for.
constexpr int kChainFewThreads = 384;
constexpr int kChainMoreThreads = 512;
constexpr int kChainMostThreads = 640;

template <bool kGrad>
constexpr int norm_stages(int most_threads, bool thin) {
  return norm_smem<kGrad>(most_threads / 32, 3, thin) <= kSm90SmemLimit ? 3 : 2;
}

static_assert(norm_smem<false>(kChainMostThreads / 32, 2, true) <= kSm90SmemLimit);
static_assert(norm_smem<true>(kChainMostThreads / 32, 2, false) <= kSm90SmemLimit);
static_assert(norm_smem<true>(kChainFewThreads / 32, 3, true) <= kSm90SmemLimit);
static_assert(chain_threads(kNormMostWidth) == kChainMostThreads);
static_assert(chain_threads(kPairMostWidth) == kChainMoreThreads);
static_assert(chain_threads(kBeforeMostWidth) == kChainFewThreads);

// A warp's part of a tile of h and of da.
constexpr int kGeluRows = 16;
constexpr int kGeluRow = kChainCols * 2 + 16;  // bytes from row to row, for the banks
constexpr int kGeluStageBytes = 2 * kGeluRows * kGeluRow;

constexpr int kGeluStages = 3;

// Beside its stages a warp has its part of S, twice.
constexpr int gelu_smem(int warps) {
  return warps * (kGeluStages * kGeluStageBytes + 2 * kGeluRows * kThinRow * 4);
}

static_assert(gelu_smem(kChainFewThreads / 32) <= kSm90SmemLimit);

// Blocks along the columns, and the warps of each, which share all columns out as evenly as can be.
constexpr int64_t gelu_parts(int64_t width) {
  return ceil_div(width, kChainFewThreads / 32 * kChainCols);
}

constexpr int gelu_warps(int64_t width) {
  return static_cast<int>(ceil_div(width / kChainCols, gelu_parts(width)));
}

// Blocks along the rows: each goes over tiles in turn, one block on a multiprocessor.
constexpr int64_t gelu_programs(int64_t rows, int64_t width, int multiprocessors) {
  const int64_t most = multiprocessors / gelu_parts(width);
  const int64_t tiles = ceil_div(rows, kGeluRows);
  return tiles < most ? tiles : most < 1 ? 1 : most;
}

// The same of GELU itself, whose blocks have whole rows and keep `down` in shared memory.
constexpr int kGeluStep = 16;                       // columns of an operand
constexpr int kGeluValueRow = kChainCols * 2 + 32;  // bytes from row to row, for the banks
constexpr int kGeluValueBytes = kGeluRows * kGeluValueRow;
constexpr int kGeluValueMostWidth = 4096;  // beyond it two stages do not fit

constexpr int gelu_value_warps(int64_t width) {
  constexpr int64_t kMost = kChainFewThreads / 32;
  return static_cast<int>(width / kChainCols < kMost ? width / kChainCols : kMost);
}

EFFT_HOST_DEVICE constexpr int gelu_down_bytes(int64_t width) {
  return static_cast<int>(width * kChainRank * 2);
}

constexpr int gelu_value_smem(int64_t width, int stages) {
  return gelu_down_bytes(width) +
         gelu_value_warps(width) * (stages * kGeluValueBytes + 2 * kGeluRows * kThinRow * 4);
}

static_assert(gelu_value_smem(kGeluValueMostWidth, 2) <= kSm90SmemLimit);
static_assert(gelu_value_smem(3072, 3) <= kSm90SmemLimit);

constexpr int64_t gelu_value_programs(int64_t rows, int multiprocessors) {
  const int64_t tiles = ceil_div(rows, kGeluRows);
  return tiles < multiprocessors ? tiles : multiprocessors;
}

// A warp's part of a tile of x or of dY.
constexpr int kPairTileBytes = kPairRows * kChainCols * 2;
constexpr int kPairStages = 3;  // of both

// Beside its stages a warp has its part of P and S in float32; their sums are in 16 bits.
constexpr int pair_smem(int warps) {
  constexpr int kThin = 2 * kPairRows * kChainRank;
  return warps * (kPairStages * 2 * kPairTileBytes + kThin * 4) + kThin * 2;
}

static_assert(pair_smem(kChainMoreThreads / 32) <= kSm90SmemLimit);

}  // namespace efft_kernels::cuda
