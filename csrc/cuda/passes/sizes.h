#pragma once

#include <cstdint>

#include "common/math.h"

// Sizes of the intermediate buffers: padded ranks and the partial sums of the two-stage reductions.
namespace efft_kernels::cuda {

constexpr int kMaxRank = 128;

// The power of two, at least 16, that holds `rank`: the width the kernels are compiled for.
constexpr int padded_rank(int64_t rank) {
  int padded = 16;
  while (padded < rank) padded *= 2;
  return padded;
}

// Elements from one row of `columns` 16-bit numbers to the next, so that rows stay 16-byte aligned.
constexpr int64_t aligned_row(int64_t columns) { return round_up(columns, 8); }

// Rows and columns of a tile of the passes over a tall matrix.
constexpr int kPassRows = 64;
constexpr int kPassCols = 64;

// S and the partial sums of d_B come from one pass over dY at this rank alone. A block leaves C·R
// floats, which are written and read again, for the 128·C halves that it reads: half as many bytes
// at R = 16, as many at R = 32, where a second pass over dY costs no more.
constexpr int kOnePassRank = 16;
constexpr int kOnePassRows = 128;
constexpr bool one_pass_gradient(int rank_padded) { return rank_padded == kOnePassRank; }

// Programs of the one-pass kernel: each adds its row blocks into its own partial sum, in order.
constexpr int64_t thin_grad_programs(int64_t m, int multiprocessors) {
  const int64_t blocks = ceil_div(m, kOnePassRows);
  return blocks < 2 * multiprocessors ? blocks : 2 * multiprocessors;
}

struct Splits {
  int64_t rows;   // rows per split, a multiple of kPassRows
  int64_t count;  // splits; none is empty
};

// How tall^T·thin, [C, R], is split over the M rows: about four blocks per multiprocessor, of at
// least 256 rows.
constexpr Splits tall_splits(int64_t m, int64_t c, int multiprocessors) {
  int64_t wanted = 4 * multiprocessors / ceil_div(c, kPassCols);
  const int64_t most = ceil_div(m, 256);
  if (wanted > most) wanted = most;
  if (wanted < 1) wanted = 1;
  const int64_t rows = round_up(ceil_div(m, wanted), kPassRows);
  return {rows, ceil_div(m, rows)};
}

}  // namespace efft_kernels::cuda
