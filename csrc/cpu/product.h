// The main product over a block of rows.
#pragma once

#include "pack.h"

namespace efft_kernels::cpu::EFFT_ISA {

// Rows that later steps read, handed out a stretch per register block.
class Upcoming {
 public:
  // `blocks` and `depth` are the register blocks of the product meanwhile and its inner dimension.
  Upcoming(int64_t blocks, int64_t depth) : iterations_(std::max<int64_t>(blocks * depth, 1)) {}

  template <class T>
  void add(const Matrix& matrix, int64_t first, int64_t rows, int64_t columns) {
    if (!is_direct<T>(matrix) || matrix.row_stride != columns || rows <= 0) return;
    const T* begin = static_cast<const T*>(matrix.data) + first * columns;
    regions_[count_++] = {reinterpret_cast<const char*>(begin),
                          reinterpret_cast<const char*>(begin + rows * columns)};
    bytes_ += rows * columns * sizeof(T);
    step_ = (bytes_ + iterations_ - 1) / iterations_;
  }

  // Sets `ahead` to the stretch that `depth` iterations cover.
  void next(int64_t depth, Ahead& ahead) {
    while (at_ < count_ && regions_[at_].begin >= regions_[at_].end) ++at_;
    if (at_ == count_) {
      ahead.rows = ahead.panel;
      ahead.rows_step = 0;
      return;
    }
    ahead.rows = regions_[at_].begin;
    ahead.rows_step = step_;
    regions_[at_].begin += step_ * depth;
  }

 private:
  struct Region {
    const char* begin;
    const char* end;
  };
  Region regions_[2] = {};
  int count_ = 0, at_ = 0;
  int64_t iterations_, bytes_ = 0, step_ = 0;
};

// thin [rows, width] times a tail: r more steps of the inner loop.
template <class T>
struct Extension {
  const T* thin = nullptr;  // null: none
  int64_t width = 0;
  Tail<T> tail = {};

  Term<T> term(int64_t i, int64_t j, int64_t across) const {
    return {thin + i * width, width, tail.panel(j), across, tail.rank};
  }
};

// out [rows, columns] = a·w + bias + the extension; out's rows have room for packed.padded columns
// where `padded`, else for packed.columns.
template <class T>
void product(Rows<T> a, int64_t rows, const Packed<T>& packed, const T* bias,
             const Extension<T>& extension, T* out, int64_t ldo, bool padded, Upcoming upcoming) {
  T edge[kRows * kPanel<T>];
  const int64_t blocks = (rows + kRows - 1) / kRows;
  const int64_t panel_step = (kPanel<T> * sizeof(T) + blocks - 1) / blocks;
  for (int64_t k = 0; k < packed.inner; k += kDepth) {
    const int64_t depth = std::min(kDepth, packed.inner - k);
    const bool first = k == 0;
    const bool last = k + kDepth >= packed.inner;
    for (int64_t j = 0; j < packed.padded; j += kPanel<T>) {
      const int64_t across = packed.panel_columns(j);
      const int64_t valid = std::min(across, packed.columns - j);
      const bool direct = padded || valid == across;
      const T* panel = packed.panel(k, depth, j);
      const T* start = first && bias != nullptr ? bias + j : nullptr;
      const char* next_panel = reinterpret_cast<const char*>(panel + across * depth);
      for (int64_t i = 0; i < rows; i += kRows) {
        const int64_t count = std::min<int64_t>(kRows, rows - i);
        const Term<T> main{a.data + i * a.stride + k, a.stride, panel, across, depth};
        const Term<T> low_rank =
            last && extension.thin != nullptr ? extension.term(i, j, across) : Term<T>{};
        T* to = out + i * ldo + j;
        if (count == kRows && across == kPanel<T> && direct) {
          Ahead ahead;
          ahead.panel = next_panel + i / kRows * panel_step * depth;
          ahead.panel_step = panel_step;
          upcoming.next(depth, ahead);
          ahead.out = i + kRows < rows ? to + kRows * ldo : out + j + across;
          block_entry<T, kRows, kVectors, true>(main, low_rank, to, ldo, start, !first, ahead);
          continue;
        }
        const BlockFn<T> run = block_fn<T>(count, across / kLanes<T>);
        if (direct) {
          run(main, low_rank, to, ldo, start, !first, Ahead{});
          continue;
        }
        for (int64_t r = 0; !first && r < count; ++r) {
          std::memcpy(edge + r * across, to + r * ldo, valid * sizeof(T));
        }
        run(main, low_rank, edge, across, start, !first, Ahead{});
        for (int64_t r = 0; r < count; ++r) {
          std::memcpy(to + r * ldo, edge + r * across, valid * sizeof(T));
        }
      }
    }
  }
}

}  // namespace efft_kernels::cpu::EFFT_ISA
