#pragma once

#include <cstdint>

#include "common/host_device.h"

// Which tile a block works on, in which order, and which tile shape a problem gets.
namespace efft_kernels::cuda {

EFFT_HOST_DEVICE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

EFFT_HOST_DEVICE constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

struct Tile {
  int32_t row;  // in tiles
  int32_t col;
};

// Tiles of an [M, C] output in the order in which persistent blocks take them. `kGroup` row tiles
// go through all columns together, so that a column's tile of w is read while it is in L2.
struct TileOrder {
  static constexpr int32_t kGroup = 8;

  int32_t rows;  // row tiles
  int32_t cols;  // column tiles

  EFFT_HOST_DEVICE constexpr int32_t count() const { return rows * cols; }

  EFFT_HOST_DEVICE constexpr Tile at(int32_t index) const {
    const int32_t per_group = kGroup * cols;
    const int32_t first = index / per_group * kGroup;
    const int32_t in_group = rows - first < kGroup ? rows - first : kGroup;
    const int32_t inside = index % per_group;
    return {first + inside % in_group, inside / in_group};
  }
};

// Whether the tile indices of an [M, C] output fit 32 bits.
constexpr bool tiles_fit(int64_t m, int64_t c, int block_m, int block_c) {
  return ceil_div(m, block_m) * ceil_div(c, block_c) <= INT32_MAX - TileOrder::kGroup * 1024;
}

constexpr TileOrder tile_order(int64_t m, int64_t c, int block_m, int block_c) {
  return {static_cast<int32_t>(ceil_div(m, block_m)), static_cast<int32_t>(ceil_div(c, block_c))};
}

constexpr int64_t waves(int64_t tiles, int multiprocessors) {
  return ceil_div(tiles, multiprocessors);
}

constexpr int kSm90BlockM = 128;
constexpr int kSm90WideBlockC = 192;
constexpr int kSm90NarrowBlockC = 128;

// The column block of the sm_90a GEMM. ViT-B with 64 images and 132 multiprocessors: 192 columns
// give the layers with 768, 2304 and 3072 outputs 3.0, 9.0 and 12.0 waves; 128 columns fit the
// widths 256, 512 and 1024. A tile costs its columns, and 32 more for what does not depend on them
// (its epilogue; an estimate).
constexpr int sm90_block_c(int64_t m, int64_t c, int multiprocessors) {
  const int64_t row_tiles = ceil_div(m, kSm90BlockM);
  const int64_t wide =
      waves(row_tiles * ceil_div(c, kSm90WideBlockC), multiprocessors) * (kSm90WideBlockC + 32);
  const int64_t narrow =
      waves(row_tiles * ceil_div(c, kSm90NarrowBlockC), multiprocessors) * (kSm90NarrowBlockC + 32);
  return wide <= narrow ? kSm90WideBlockC : kSm90NarrowBlockC;
}

// Below a quarter of the chip's multiprocessors, more and smaller tiles of the general kernel are
// the better use of it (an estimate).
constexpr bool enough_tiles_for_sm90(int64_t m, int64_t c, int multiprocessors) {
  return 4 * ceil_div(m, kSm90BlockM) * ceil_div(c, kSm90NarrowBlockC) >= multiprocessors;
}

// The edge of the general kernel's square tiles: 128 where they fill the chip, else 64.
constexpr int sm80_block(int64_t m, int64_t c, int multiprocessors) {
  return ceil_div(m, 128) * ceil_div(c, 128) >= multiprocessors ? 128 : 64;
}

}  // namespace efft_kernels::cuda
