// Prefetches spread over the main product. All at once they would delay the loads of the product
// itself; where its matrices are not in the second-level cache, they save a tenth of its time.
#pragma once

#include "storage.h"

namespace efft_kernels::cpu::EFFT_ISA {

constexpr int64_t kCacheLine = 64;
// Steps of the inner dimension between two prefetches.
constexpr int64_t kPrefetchInterval = 8;
// Rows between a load and its prefetch where each row of a transposed operand is on another line.
constexpr int64_t kPrefetchRows = 8;

// What a register block prefetches while it runs.
struct Prefetch {
  const char* panel = nullptr;  // part of the next panel of w
  int64_t panel_lines = 0;      // of it in every interval
  const char* row = nullptr;    // part of a row of `a` that a later step reads
  const void* out = nullptr;    // the block of `out` that is stored next
  const void* x = nullptr;      // the block of the same size that is read next
  int64_t x_stride = 0;
};

// Deals rows [count, columns] out to `blocks` register blocks, so that together they prefetch all.
template <class T>
class PrefetchCursor {
 public:
  PrefetchCursor(Rows<T> rows, int64_t count, int64_t columns, int64_t blocks)
      : rows_(rows),
        count_(count),
        parts_per_row_(count > 0 ? std::max<int64_t>(blocks / count, 1) : 1),
        part_bytes_(columns * static_cast<int64_t>(sizeof(T)) / parts_per_row_) {}

  // The next part of a row, or `otherwise` where all are dealt out.
  const char* next(const char* otherwise) {
    if (row_ >= count_) return otherwise;
    const char* part =
        reinterpret_cast<const char*>(rows_.data + row_ * rows_.stride) + part_ * part_bytes_;
    if (++part_ == parts_per_row_) {
      part_ = 0;
      ++row_;
    }
    return part;
  }

 private:
  Rows<T> rows_;
  int64_t count_, parts_per_row_, part_bytes_;
  int64_t row_ = 0, part_ = 0;
};

}  // namespace efft_kernels::cpu::EFFT_ISA
