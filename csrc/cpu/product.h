// The main product over a block of rows, and the thin ones that ride on it.
#pragma once

#include "pack.h"
#include "thin.h"

namespace efft_kernels::cpu::EFFT_ISA {

// What is made beside the main product, a step of kDepth columns of `a` at a time, while they are
// in cache. Whatever is null is not asked for.
template <class T>
struct Riders {
  int64_t width = 0;  // of every thin matrix

  const T* thin_in = nullptr;  // [inner, width]
  T* thin = nullptr;           // [rows, width] = a·thin_in
  Tail<T> tail = {};           // out += thin·tail

  const T* tall_with = nullptr;  // [rows, width]
  T* tall = nullptr;             // [inner, width] += a^T·tall_with

  Rows<T> beside = {};       // [rows, columns]
  T* beside_tall = nullptr;  // [columns, width] += beside^T·thin
};

// Asks, block after block, for rows [count, columns] that the next step reads.
template <class T>
class Stretches {
 public:
  Stretches(Rows<T> rows, int64_t count, int64_t columns, int64_t blocks)
      : rows_(rows),
        end_(count),
        per_row_(count > 0 ? std::max<int64_t>(blocks / count, 1) : 1),
        bytes_(columns * static_cast<int64_t>(sizeof(T)) / per_row_) {}

  // The next stretch, or `otherwise` where there is none left.
  const char* next(const char* otherwise) {
    if (row_ >= end_) return otherwise;
    const char* stretch =
        reinterpret_cast<const char*>(rows_.data + row_ * rows_.stride) + part_ * bytes_;
    if (++part_ == per_row_) {
      part_ = 0;
      ++row_;
    }
    return stretch;
  }

 private:
  Rows<T> rows_;
  int64_t end_, per_row_, bytes_;
  int64_t row_ = 0, part_ = 0;
};

// out [rows, columns] = a·w + bias + thin·tail, and the riders. out's rows have room for
// packed.padded columns where `padded`, else for packed.columns. `following` rows come after these
// in memory and are multiplied next.
template <class T>
void product(Rows<T> a, int64_t rows, const Packed<T>& packed, const T* bias,
             const Riders<T>& riders, T* out, int64_t ldo, bool padded, int64_t following) {
  T edge[kRows * kPanel<T>];
  const int64_t width = riders.width;
  const int64_t blocks = (rows + kRows - 1) / kRows;
  const int64_t strides = blocks * ((std::min(kDepth, packed.inner) + kStride - 1) / kStride);
  const int64_t panel_bytes = std::min(kDepth, packed.inner) * kPanel<T> * sizeof(T);
  const int64_t panel_lines = (panel_bytes / kLine + strides - 1) / strides;
  for (int64_t k = 0; k < packed.inner; k += kDepth) {
    const int64_t depth = std::min(kDepth, packed.inner - k);
    const bool first = k == 0;
    const bool last = k + kDepth >= packed.inner;
    const Rows<T> slice{a.data + k, a.stride};
    if (riders.thin_in != nullptr) {
      thin_product(slice, rows, depth, riders.thin_in + k * width, width, riders.thin, !first);
    }
    if (riders.tall != nullptr) {
      tall_product(slice.data, slice.stride, riders.tall_with, width, rows, riders.tall + k * width,
                   width, depth, width);
    }
    const bool beside = last && riders.beside_tall != nullptr;
    Stretches<T> upcoming =
        last ? Stretches<T>({a.data + rows * a.stride, a.stride}, following,
                            std::min(kDepth, packed.inner), packed.blocks(rows))
             : Stretches<T>({slice.data + depth, slice.stride}, rows,
                            std::min(kDepth, packed.inner - k - depth), packed.blocks(rows));
    for (int64_t j = 0; j < packed.padded; j += kPanel<T>) {
      const int64_t across = packed.panel_columns(j);
      const int64_t valid = std::min(across, packed.columns - j);
      const bool direct = padded || valid == across;
      const T* panel = packed.panel(k, depth, j);
      const T* start = first && bias != nullptr ? bias + j : nullptr;
      const char* next_panel = reinterpret_cast<const char*>(panel + across * depth);
      for (int64_t i = 0; i < rows; i += kRows) {
        const int64_t count = std::min<int64_t>(kRows, rows - i);
        const Term<T> main{slice.data + i * a.stride, a.stride, panel, across, depth};
        const Term<T> low_rank = last && riders.tail.data != nullptr
                                     ? Term<T>{riders.thin + i * width, width, riders.tail.panel(j),
                                               across, riders.tail.rank}
                                     : Term<T>{};
        T* to = out + i * ldo + j;
        if (count == kRows && across == kPanel<T> && direct) {
          Ahead ahead;
          ahead.panel = next_panel + i / kRows * (depth / kStride) * panel_lines * kLine;
          ahead.panel_lines = panel_lines;
          ahead.rows = upcoming.next(ahead.panel);
          ahead.out = i + kRows < rows ? to + kRows * ldo : out + j + across;
          ahead.beside = ahead.out;
          ahead.beside_stride = ldo;
          if (beside) {
            ahead.beside = riders.beside.data + i * riders.beside.stride + j + across;
            ahead.beside_stride = riders.beside.stride;
          }
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
      if (beside) {
        tall_product(riders.beside.data + j, riders.beside.stride, riders.thin, width, rows,
                     riders.beside_tall + j * width, width, valid, width);
      }
    }
  }
}

}  // namespace efft_kernels::cpu::EFFT_ISA
