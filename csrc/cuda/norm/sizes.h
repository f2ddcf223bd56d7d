#pragma once

#include <cstdint>

#include "common/math.h"
#include "common/smem_limits.h"

// Sizes of the norm's kernels. A block goes over tiles of 8 whole rows; each of its warps has 64
// columns of them, which it copies for itself.
namespace efft_kernels::cuda {

constexpr int kNormRows = 8;
constexpr int kNormCols = 64;          // of a warp
constexpr int kNormRank = 16;          // R
constexpr int kNormMostThreads = 512;  // with more, registers would be spilled
constexpr int kNormMostWidth = kNormMostThreads / 32 * kNormCols;

// Whether the kernels take rows of `width` elements and a rank.
constexpr bool norm_takes(int64_t width, int64_t rank) {
  return width > 0 && width % kNormCols == 0 && width <= kNormMostWidth && rank <= kNormRank;
}

constexpr int norm_threads(int64_t width) { return static_cast<int>(width / kNormCols * 32); }

// Blocks: each goes over tiles in turn, about 12 warps on a multiprocessor.
constexpr int64_t norm_programs(int64_t rows, int64_t width, int multiprocessors) {
  const int64_t tiles = ceil_div(rows, kNormRows);
  const int64_t together = norm_threads(width) >= 384 ? 1 : 384 / norm_threads(width);
  const int64_t most = multiprocessors * (together > 4 ? 4 : together);
  return tiles < most ? tiles : most;
}

// A warp's part of a tile in shared memory, a matrix in rows that are so far apart that no access
// of the kernel's lanes meets another in a bank: in the forward a lane reads one row, in the
// backward two of every four.
template <bool kGrad>
struct NormStage {
  static constexpr int kWide = kNormCols * 4 + (kGrad ? 16 : 64);    // bytes from row to row
  static constexpr int kNarrow = kNormCols * 2 + (kGrad ? 16 : 32);  // of 16-bit elements
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

// The kernels are compiled twice, for so many threads at most, with as many stages as there is room
// for.
constexpr int kNormFewThreads = 384;

template <bool kGrad>
constexpr int norm_stages(int most_threads) {
  return norm_smem<kGrad>(most_threads / 32, 3) <= kSm90SmemLimit ? 3 : 2;
}

static_assert(norm_smem<true>(kNormMostThreads / 32, 2) <= kSm90SmemLimit);

}  // namespace efft_kernels::cuda
