// Every output tile is some block's, exactly once, whatever the grid; block shapes fit the problem.

#include <vector>

#include "csrc/cuda/gemm/schedule.h"
#include "csrc/cuda/gemm/select.h"
#include "expect.h"

using namespace efft_kernels::cuda;

static void every_tile_once(int rows, int cols, int blocks) {
  const TileOrder order{rows, cols};
  std::vector<int> seen(static_cast<size_t>(rows) * cols, 0);
  for (int block = 0; block < blocks; ++block) {
    for (int index = block; index < order.count(); index += blocks) {
      const Tile tile = order.at(index);
      const bool inside = tile.row >= 0 && tile.row < rows && tile.col >= 0 && tile.col < cols;
      EXPECT(inside, "%dx%d tiles, index %d: (%d, %d)", rows, cols, index, tile.row, tile.col);
      if (inside) ++seen[static_cast<size_t>(tile.row) * cols + tile.col];
    }
  }
  for (const int count : seen)
    EXPECT(count == 1, "%dx%d tiles: one came %d times", rows, cols, count);
}

// A group's row tiles share a column's tile of w: its columns change slowest.
static void columns_change_slowest_inside_a_group() {
  const TileOrder order{13, 5};
  for (int index = 1; index < order.count(); ++index) {
    const Tile before = order.at(index - 1);
    const Tile now = order.at(index);
    const bool same_group = before.row / TileOrder::kGroup == now.row / TileOrder::kGroup;
    if (same_group)
      EXPECT(now.col == before.col || now.col == before.col + 1, "index %d", index);
    else
      EXPECT(now.col == 0, "index %d starts a group at column %d", index, now.col);
  }
}

static void block_shapes() {
  // ViT-B with 64 images on 132 multiprocessors.
  for (const int c : {768, 2304, 3072}) EXPECT(sm90_block_c(12608, c, 132) == 192, "%d columns", c);
  for (const int c : {128, 256, 512, 1024})
    EXPECT(sm90_block_c(12608, c, 132) == 128, "%d columns", c);
  // 5 waves of 192 columns cost as much as 7 of 128, and read a less often.
  EXPECT(sm90_block_c(132 * 128, 896, 132) == 192, "the same cost");
  for (const int c : {768, 2304, 3072}) EXPECT(sm90_cluster(c, 192, 132) == 2, "%d columns", c);
  EXPECT(sm90_cluster(576, 192, 132) == 1 && sm90_cluster(768, 192, 1) == 1, "no pairs");
  EXPECT(enough_tiles_for_sm90(12608, 768, 132), "a full GPU");
  EXPECT(!enough_tiles_for_sm90(197, 768, 132), "one image");
  EXPECT(enough_tiles_for_sm90(33 * 128, 128, 132), "a quarter of the GPU");
  EXPECT(!enough_tiles_for_sm90(32 * 128, 128, 132), "a tile less");
  EXPECT(sm80_block(12608, 2304, 108) == 128 && sm80_block(197, 768, 108) == 64, "edges");
  EXPECT(tiles_fit(int64_t{1} << 20, 1 << 16, 128, 128), "many");
  EXPECT(!tiles_fit(int64_t{1} << 30, int64_t{1} << 30, 64, 64), "too many");
}

int main() {
  for (const int rows : {1, 2, 7, 8, 9, 13, 99, 211})
    for (const int cols : {1, 3, 4, 12, 17, 101})
      for (const int blocks : {1, 7, 108, 132}) every_tile_once(rows, cols, blocks);
  columns_change_slowest_inside_a_group();
  block_shapes();
  return failures() != 0;
}
