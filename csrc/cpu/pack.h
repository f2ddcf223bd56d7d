// The weight in the order in which the product reads it.
#pragma once

#include "blocking.h"
#include "microkernel.h"

namespace efft_kernels::cpu::EFFT_ISA {

// w [inner, columns] in panels: for every step of kDepth rows, for every panel of kPanel columns,
// the panel's rows one after another.
template <class T>
struct Packed {
  int64_t inner = 0;
  int64_t columns = 0;
  int64_t padded = 0;  // columns in whole vectors
  T* body = nullptr;

  Packed() = default;
  Packed(Arena<T>& arena, int64_t inner, int64_t columns)
      : inner(inner), columns(columns), padded(round_up(columns, kLanes<T>)) {
    body = arena.take(inner * padded);
  }
  // Register blocks of a product with `rows` rows, for each of the packed steps.
  int64_t blocks(int64_t rows) const {
    return (rows + kRows - 1) / kRows * ((padded + kPanel<T> - 1) / kPanel<T>);
  }
  int64_t panel_columns(int64_t j) const { return std::min(kPanel<T>, padded - j); }
  T* panel(int64_t step, int64_t depth, int64_t j) const {
    return body + step * padded + j * depth;
  }
};

// out [depth, width] = the transpose of w[n0 .. n0 + columns, k0 .. k0 + depth], zero beyond
// `columns`.
template <class T>
void pack_transposed(const Matrix& w, int64_t n0, int64_t columns, int64_t width, int64_t k0,
                     int64_t depth, T* out) {
  constexpr int64_t lanes = kLanes<T>;
  T square[lanes * lanes];
  for (int64_t n = 0; n < width; n += lanes) {
    const int64_t valid = std::clamp<int64_t>(columns - n, 0, lanes);
    for (int64_t k = 0; k < depth; k += lanes) {
      const int64_t across = std::min(lanes, depth - k);
      Vec<T> v[lanes];
      if (is_direct<T>(w) && valid == lanes && across == lanes) {
        const T* from = static_cast<const T*>(w.data) + (n0 + n) * w.row_stride + k0 + k;
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i) v[i] = load(from + i * w.row_stride);
      } else {
        for (int64_t i = 0; i < lanes; ++i) {
          if (i < valid) read_row(w, n0 + n + i, k0 + k, square + i * lanes, across);
          for (int64_t l = i < valid ? across : 0; l < lanes; ++l) square[i * lanes + l] = T(0);
        }
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i) v[i] = load(square + i * lanes);
      }
      transpose<T>(v);
      T* to = out + k * width + n;
      if (across == lanes) {
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i) store(to + i * width, v[i]);
      } else {
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i) {
          if (i < across) store(to + i * width, v[i]);
        }
      }
    }
  }
}

template <class T>
void pack_rows(const Matrix& w, int64_t j0, int64_t columns, int64_t width, int64_t k0,
               int64_t depth, T* out) {
  if (is_direct<T>(w) && columns == width) {
    const T* from = static_cast<const T*>(w.data) + k0 * w.row_stride + j0;
    for (int64_t k = 0; k < depth; ++k) {
      for (int64_t j = 0; j < width; j += kCacheLine / sizeof(T)) {
        __builtin_prefetch(from + kPrefetchRows * w.row_stride + j, 0, 3);
      }
      for (int64_t j = 0; j < width; j += kLanes<T>) store(out + j, load(from + j));
      from += w.row_stride;
      out += width;
    }
    return;
  }
  for (int64_t k = 0; k < depth; ++k) {
    T* row = out + k * width;
    read_row(w, k0 + k, j0, row, columns);
    for (int64_t j = columns; j < width; ++j) row[j] = T(0);
  }
}

// thin_out^T in the same panels: [rank, panel columns] each, one after another.
template <class T>
struct Tail {
  int64_t rank = 0;
  const T* data = nullptr;

  const T* panel(int64_t j) const { return data + j * rank; }
};

// thin_out is [columns, width], its first `rank` columns filled.
template <class T>
Tail<T> pack_tail(const T* thin_out, int64_t width, int64_t rank, int64_t columns, T* out) {
  const Matrix rows{const_cast<T*>(thin_out), kStored<T>, width, 1};
  const int64_t padded = round_up(columns, kLanes<T>);
  for (int64_t j = 0; j < padded; j += kPanel<T>) {
    const int64_t across = std::min(kPanel<T>, padded - j);
    pack_transposed(rows, j, std::min(across, columns - j), across, 0, rank, out + j * rank);
  }
  return {rank, out};
}

// Packs w, [columns, inner] if `transposed` else [inner, columns], adding thin_in·thin_out^T where
// thin_in, of `width` columns, is not null.
template <class T>
void pack(const Matrix& w, bool transposed, const T* thin_in, int64_t width,
          const Tail<T>& thin_out, const Packed<T>& packed) {
  const int64_t panels = (packed.padded + kPanel<T> - 1) / kPanel<T>;
  const int64_t steps = (packed.inner + kDepth - 1) / kDepth;
  parallel_each(panels, [&](int64_t panel) {
    const int64_t j = panel * kPanel<T>;
    const int64_t across = packed.panel_columns(j);
    const int64_t valid = std::min(across, packed.columns - j);
    for (int64_t s = 0; s < steps; ++s) {
      const int64_t k = s * kDepth;
      const int64_t depth = std::min(kDepth, packed.inner - k);
      T* out = packed.panel(k, depth, j);
      if (transposed) {
        pack_transposed(w, j, valid, across, k, depth, out);
      } else {
        pack_rows(w, j, valid, across, k, depth, out);
      }
      if (thin_in == nullptr) continue;
      for (int64_t i = 0; i < depth; i += kRows) {
        const int64_t rows = std::min<int64_t>(kRows, depth - i);
        const Term<T> low_rank{thin_in + (k + i) * width, width, thin_out.panel(j), across,
                               thin_out.rank};
        block_fn<T>(rows, across / kLanes<T>)(low_rank, Term<T>{}, out + i * across, across,
                                              nullptr, true, Prefetch{});
      }
    }
  });
}

}  // namespace efft_kernels::cpu::EFFT_ISA
