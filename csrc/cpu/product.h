// The main product over a block of rows, with the thin products fused into it.
#pragma once

#include "pack.h"
#include "thin.h"

namespace efft_kernels::cpu::EFFT_ISA {

// Thin products over the same rows as the main product a·w, made in steps of kDepth columns of `a`
// while these are in cache. A product whose result is null is left out.
template <class T>
struct FusedThinProducts {
  int64_t rank = 0;   // Ra
  int64_t width = 0;  // of thin matrices' rows: Ra padded

  const T* thin_in = nullptr;  // [inner, width]: down in the forward, B in the backward
  T* thin = nullptr;           // [rows, width] = a·thin_in: P in the forward, S in the backward
  Tail<T> tail = {};           // out += thin·tail

  // The backward's, where a = dY and out = dX.
  const T* p = nullptr;   // [rows, width]
  T* d_b_t = nullptr;     // [Ra, inner padded] += p^T·a
  Rows<T> x = {};         // [rows, columns]
  T* d_down_t = nullptr;  // [Ra, columns padded] += thin^T·x
};

// Where the product of a block of rows is stored. Rows have room for the packed weight's padded
// columns where `padded`, else for its columns alone.
template <class T>
struct OutputBlock {
  T* data;
  int64_t stride;
  bool padded;
};

// out = a·w + bias + thin·tail, and the fused products. The `next_rows` rows that follow a's in
// memory are prefetched, since the next block reads them.
template <class T>
void product(Rows<T> a, int64_t rows, int64_t next_rows, const Packed<T>& packed, const T* bias,
             const FusedThinProducts<T>& fused, const OutputBlock<T>& out) {
  T edge[kRows * kPanel<T>];
  const int64_t width = fused.width;
  const int64_t step_depth = std::min(kDepth, packed.inner);
  const int64_t blocks = (rows + kRows - 1) / kRows;
  const int64_t intervals = blocks * ((step_depth + kPrefetchInterval - 1) / kPrefetchInterval);
  const int64_t panel_bytes = step_depth * kPanel<T> * sizeof(T);
  const int64_t panel_lines = (panel_bytes / kCacheLine + intervals - 1) / intervals;
  for (int64_t k = 0; k < packed.inner; k += kDepth) {
    const int64_t depth = std::min(kDepth, packed.inner - k);
    const bool first = k == 0;
    const bool last = k + kDepth >= packed.inner;
    const Rows<T> slice{a.data + k, a.stride};

    // Thin products with this slice of a.
    if (fused.thin_in != nullptr) {
      thin_product(slice, rows, depth, fused.thin_in + k * width, width, fused.thin, !first);
    }
    if (fused.d_b_t != nullptr) {
      add_transposed_product<T>({fused.p, width}, fused.rank, slice, depth, rows, fused.d_b_t + k,
                                round_up(packed.inner, kLanes<T>));
    }
    const bool with_d_down = last && fused.d_down_t != nullptr;
    PrefetchCursor<T> upcoming =
        last ? PrefetchCursor<T>({a.data + rows * a.stride, a.stride}, next_rows, step_depth,
                                 packed.blocks(rows))
             : PrefetchCursor<T>({slice.data + depth, slice.stride}, rows,
                                 std::min(kDepth, packed.inner - k - depth), packed.blocks(rows));

    // Main product, a panel of w at a time.
    for (int64_t j = 0; j < packed.padded; j += kPanel<T>) {
      const int64_t across = packed.panel_columns(j);
      const int64_t valid = std::min(across, packed.columns - j);
      const bool direct = out.padded || valid == across;
      const T* panel = packed.panel(k, depth, j);
      const T* start = first && bias != nullptr ? bias + j : nullptr;
      const char* next_panel = reinterpret_cast<const char*>(panel + across * depth);
      for (int64_t i = 0; i < rows; i += kRows) {
        const int64_t count = std::min<int64_t>(kRows, rows - i);
        const Term<T> main{slice.data + i * a.stride, a.stride, panel, across, depth};
        const Term<T> low_rank = last && fused.tail.data != nullptr
                                     ? Term<T>{fused.thin + i * width, width, fused.tail.panel(j),
                                               across, fused.tail.rank}
                                     : Term<T>{};
        T* to = out.data + i * out.stride + j;
        if (count == kRows && across == kPanel<T> && direct) {
          Prefetch prefetch;
          prefetch.panel =
              next_panel + i / kRows * (depth / kPrefetchInterval) * panel_lines * kCacheLine;
          prefetch.panel_lines = panel_lines;
          prefetch.row = upcoming.next(prefetch.panel);
          prefetch.out = i + kRows < rows ? to + kRows * out.stride : out.data + j + across;
          prefetch.x = prefetch.out;
          prefetch.x_stride = out.stride;
          if (with_d_down) {
            prefetch.x = fused.x.data + i * fused.x.stride + j + across;
            prefetch.x_stride = fused.x.stride;
          }
          block_entry<T, kRows, kVectors, true>(main, low_rank, to, out.stride, start, !first,
                                                prefetch);
          continue;
        }
        const BlockFn<T> run = block_fn<T>(count, across / kLanes<T>);
        if (direct) {
          run(main, low_rank, to, out.stride, start, !first, Prefetch{});
          continue;
        }
        for (int64_t r = 0; !first && r < count; ++r) {
          std::memcpy(edge + r * across, to + r * out.stride, valid * sizeof(T));
        }
        run(main, low_rank, edge, across, start, !first, Prefetch{});
        for (int64_t r = 0; r < count; ++r) {
          std::memcpy(to + r * out.stride, edge + r * across, valid * sizeof(T));
        }
      }
      if (with_d_down) {
        add_transposed_product<T>({fused.thin, width}, fused.rank,
                                  {fused.x.data + j, fused.x.stride}, valid, rows,
                                  fused.d_down_t + j, packed.padded);
      }
    }
  }
}

}  // namespace efft_kernels::cpu::EFFT_ISA
