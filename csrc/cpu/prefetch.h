// Prefetches spread over the main product. All at once they would delay the loads of the product
// itself.
#pragma once

#include "storage.h"

namespace efft_kernels::cpu::EFFT_ISA {

constexpr int64_t kCacheLine = 64;
// Steps of the inner dimension between two prefetches.
constexpr int64_t kPrefetchInterval = 8;
// Rows between a load and its prefetch where each row of an operand is on other lines.
constexpr int64_t kPrefetchRows = 8;

// The cache lines of some rows, prefetched a few at a time.
class Lines {
 public:
  Lines() = default;
  Lines(const void* first, int64_t row_bytes, int64_t rows, int64_t bytes)
      : row_(static_cast<const char*>(first)),
        row_bytes_(row_bytes),
        rows_(rows),
        per_row_((bytes + kCacheLine - 1) / kCacheLine) {}

  int64_t left() const { return rows_ * per_row_ - line_; }

  EFFT_INLINE void prefetch(int64_t count) {
    for (; count > 0 && rows_ > 0; --count) {
      __builtin_prefetch(row_ + line_ * kCacheLine, 0, 2);
      if (++line_ < per_row_) continue;
      line_ = 0;
      row_ += row_bytes_;
      --rows_;
    }
  }

 private:
  const char* row_ = nullptr;
  int64_t row_bytes_ = 0;
  int64_t rows_ = 0;
  int64_t per_row_ = 0;
  int64_t line_ = 0;  // of the first row that is left
};

// What a register block prefetches while it runs, in each pair of intervals.
struct Prefetch {
  Lines* a = nullptr;  // the rows of `a` that the next blocks read
  int64_t a_lines = 0;
  Lines* w = nullptr;  // what is packed next of w
  int64_t w_lines = 0;
  const void* out = nullptr;  // the block of `out` that is stored next
};

}  // namespace efft_kernels::cpu::EFFT_ISA
