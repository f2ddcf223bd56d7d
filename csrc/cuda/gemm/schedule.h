#pragma once

#include <cstdint>

#include "common/host_device.h"
#include "common/math.h"

// Which output tile a block works on, and in which order.
namespace efft_kernels::cuda {

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

// How many blocks, side by side along C, load the rows of `a` that they share for each other. Two
// where each has a tile at all times.
constexpr int sm90_cluster(int64_t c, int block_c, int multiprocessors) {
  return ceil_div(c, block_c) % 2 == 0 && multiprocessors >= 2 ? 2 : 1;
}

}  // namespace efft_kernels::cuda
