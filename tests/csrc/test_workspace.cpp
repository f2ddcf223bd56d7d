// The two-stage reductions' shares cover the rows once, and no share is empty.

#include <initializer_list>

#include "csrc/cuda/passes/config.h"
#include "csrc/cuda/passes/sizes.h"
#include "expect.h"

using namespace efft_kernels::cuda;

int main() {
  for (int rank = 1; rank <= kMaxRank; ++rank) {
    const int padded = padded_rank(rank);
    EXPECT(padded >= rank && padded >= 16 && (padded & (padded - 1)) == 0, "rank %d", rank);
    EXPECT(padded == 16 || padded < 2 * rank, "rank %d: %d", rank, padded);
  }
  for (const int64_t m : {1, 63, 64, 65, 257, 1031, 12608, 100003, 10000019}) {
    for (const int64_t c : {1, 64, 65, 768, 2304, 3072, 40961}) {
      for (const int multiprocessors : {1, 48, 108, 132}) {
        const Splits splits = tall_splits(m, c, multiprocessors);
        EXPECT(splits.rows % kPassRows == 0, "rows %ld", static_cast<long>(splits.rows));
        EXPECT(splits.count * splits.rows >= m, "m %ld is covered", static_cast<long>(m));
        EXPECT((splits.count - 1) * splits.rows < m, "m %ld: none empty", static_cast<long>(m));
        EXPECT(splits.count <= 65535, "a grid's second dim");
        EXPECT(splits.count <= ceil_div(m, 256), "m %ld: too thin", static_cast<long>(m));
        EXPECT(splits.count == 1 || splits.count * ceil_div(c, kPassCols) <= 4 * multiprocessors,
               "m %ld: more blocks than four a multiprocessor", static_cast<long>(m));
        const int64_t programs = thin_grad_programs(m, multiprocessors);
        EXPECT(programs >= 1 && programs <= ceil_div(m, kOnePassRows), "programs of m %ld",
               static_cast<long>(m));
      }
    }
  }
  EXPECT(PassConfig<16>::kRows == kPassRows && PassConfig<16>::kCols == kPassCols, "one tile");
  EXPECT(aligned_row(769) == 776 && aligned_row(768) == 768, "16-byte rows");
  return failures() != 0;
}
