// How the main product is cut into tiles of `out`, which threads take one after another.
#pragma once

#include "blocking.h"

namespace efft_kernels::cpu::EFFT_ISA {

// Rows `first` .. of a range of rows, columns `column` .. of `across`, whole vectors.
struct Tile {
  int64_t first = 0, rows = 0, column = 0, across = 0;
};

// Every tile packs its columns of w for its rows alone, so tall tiles pack least; but there must be
// enough of them for all threads. Those of the same columns follow each other: threads that run at
// the same time read the same part of w.
template <class T>
class Tiling {
 public:
  Tiling(int64_t rows, int64_t columns, int64_t threads)
      : rows_(rows), padded_(round_up(columns, kLanes<T>)) {
    const int64_t panels = (padded_ + kPanel<T> - 1) / kPanel<T>;
    double least = -1;
    for (int64_t across = std::min(kTilePanels, panels); across > 0; --across) {
      const int64_t wide = (panels + across - 1) / across;
      const int64_t least_high = (rows + kTileRows - 1) / kTileRows;
      const int64_t most_high = std::min((rows + kRows - 1) / kRows, 4 * threads / wide);
      for (int64_t high = least_high; high <= std::max(least_high, most_high); ++high) {
        const int64_t height = round_up((rows + high - 1) / high, kRows);
        const int64_t turns = (wide * high + threads - 1) / threads;
        // Packing a row of w takes as long as kPacking rows of the product with it. Of the last
        // turn an eighth is lost on average: threads do not end at the same time.
        const double time = (turns + 0.125) * across * (height + kPacking);
        if (least >= 0 && time >= least) continue;
        least = time;
        across_ = across * kPanel<T>;
        height_ = height;
      }
    }
    high_ = (rows + height_ - 1) / height_;
    count_ = high_ * ((padded_ + across_ - 1) / across_);
  }

  int64_t count() const { return count_; }

  Tile operator[](int64_t i) const {
    const int64_t first = i % high_ * height_, column = i / high_ * across_;
    return {first, std::min(height_, rows_ - first), column, std::min(across_, padded_ - column)};
  }

 private:
  static constexpr int64_t kPacking = 24;  // measured on an AMD EPYC

  int64_t rows_, padded_;
  int64_t height_ = 0, across_ = 0;  // of a tile that is not at the edge
  int64_t high_ = 0, count_ = 0;
};

}  // namespace efft_kernels::cpu::EFFT_ISA
