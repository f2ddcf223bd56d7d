// Parts of the weight in the order in which the product reads them.
#pragma once

#include "blocking.h"
#include "microkernel.h"

namespace efft_kernels::cpu::EFFT_ISA {

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

// thin_out^T in the same panels: [steps, panel columns] each, one after another; a step is a row of
// it, or of Pairs two.
template <class T>
struct Tail {
  int64_t steps = 0;
  const T* data = nullptr;

  template <class E>
  const E* panel(int64_t j) const {
    static_assert(sizeof(E) == sizeof(T));
    return reinterpret_cast<const E*>(data) + j * steps;
  }
};

// Numbers of T that a tail takes.
template <class T>
int64_t tail_size(int64_t rank, int64_t columns) {
  return rank * round_up(columns, kLanes<T>);
}

// thin_out is [columns, width], its first `rank` columns filled, the others zero; `in_pairs`, it is
// rounded to bfloat16.
template <class T>
Tail<T> pack_tail(const T* thin_out, int64_t width, int64_t rank, int64_t columns, bool in_pairs,
                  T* out) {
  const Matrix rows{const_cast<T*>(thin_out), kStored<T>, width, 1};
  const int64_t padded = round_up(columns, kLanes<T>);
  const int64_t steps = in_pairs ? (rank + 1) / 2 : rank;
  for (int64_t j = 0; j < padded; j += kPanel<T>) {
    const int64_t across = std::min(kPanel<T>, padded - j);
    const int64_t valid = std::min(across, columns - j);
    if constexpr (kCanPair<T>) {
      if (in_pairs) {
        pack_pairs_transposed<float>(rows, j, valid, across, 0, 2 * steps,
                                     reinterpret_cast<Pair*>(out) + j * steps);
        continue;
      }
    }
    pack_transposed(rows, j, valid, across, 0, rank, out + j * steps);
  }
  return {steps, out};
}

// w [inner, columns] as the product reads it, w += thin_in·thin_out^T where thin_in is not null.
template <class T>
struct Weight {
  Matrix matrix;  // [columns, inner] if `transposed`, else [inner, columns]
  bool transposed = false;
  int64_t inner = 0;
  int64_t columns = 0;
  const T* thin_in = nullptr;  // [inner, width]
  int64_t width = 0;
  Tail<T> thin_out = {};

  void merge(const T* in, int64_t in_width, const Tail<T>& out) {
    thin_in = in;
    width = in_width;
    thin_out = out;
  }

  // Whether it can be packed in Pairs.
  bool in_pairs() const {
    return matrix.column_stride == 1 && matrix.dtype != DType::kFloat64 && inner % 2 == 0;
  }

  // Rows k .. k + depth of columns j .. j + across, where they lie.
  Lines lines(int64_t k, int64_t depth, int64_t j, int64_t across) const {
    if (matrix.column_stride != 1) return {};
    const int64_t size = size_of(matrix.dtype), row_bytes = matrix.row_stride * size;
    const char* data = static_cast<const char*>(matrix.data);
    if (transposed) return {data + j * row_bytes + k * size, row_bytes, across, depth * size};
    return {data + k * row_bytes + j * size, row_bytes, depth, across * size};
  }

  // Rows k .. k + depth of columns j .. j + across, in panels of kPanel columns: each panel's rows
  // one after another, zero beyond the last column; of Pairs, the pairs of rows.
  template <class E>
  void pack(int64_t k, int64_t depth, int64_t j, int64_t across, E* out) const {
    for (const int64_t end = j + across; j < end; j += kPanel<T>) {
      const int64_t panel = std::min(kPanel<T>, end - j);
      pack_panel(k, depth, j, panel, out);
      out += panel * (depth / Element<E>::kNumbers);
    }
  }

 private:
  void pack_panel(int64_t k, int64_t depth, int64_t j, int64_t panel, T* out) const {
    const int64_t valid = std::min(panel, columns - j);
    if (transposed) {
      pack_transposed(matrix, j, valid, panel, k, depth, out);
    } else {
      pack_rows(matrix, j, valid, panel, k, depth, out);
    }
    for (int64_t i = 0; thin_in != nullptr && i < depth; i += kRows) {
      const int64_t rows = std::min<int64_t>(kRows, depth - i);
      const Term<T> low_rank{thin_in + (k + i) * width, width, thin_out.template panel<T>(j), panel,
                             thin_out.steps};
      block_fn<T>(rows, panel / kLanes<T>)(low_rank, Term<T>{}, out + i * panel, panel, nullptr,
                                           true, Prefetch{});
    }
  }

  void pack_panel(int64_t k, int64_t depth, int64_t j, int64_t panel, Pair* out) const {
    if (matrix.dtype == DType::kFloat32) {
      pack_pairs<float>(k, depth, j, panel, out);
    } else {
      pack_pairs<uint16_t>(k, depth, j, panel, out);
    }
  }

  template <class S>
  void pack_pairs(int64_t k, int64_t depth, int64_t j, int64_t panel, Pair* out) const {
    const int64_t valid = std::min(panel, columns - j);
    if (transposed) {
      pack_pairs_transposed<S>(matrix, j, valid, panel, k, depth, out);
    } else {
      pack_pairs_rows<S>(matrix, j, valid, panel, k, depth, out);
    }
  }
};

}  // namespace efft_kernels::cpu::EFFT_ISA
