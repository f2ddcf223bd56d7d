// Products whose result has a few columns: a·b and a^T·b for b of `width` columns.
#pragma once

#include "blocking.h"
#include "microkernel.h"

namespace efft_kernels::cpu::EFFT_ISA {

// a·b into c [rows, width] (added to it if `add`), for a [rows, inner] and b [inner, width].
template <class T>
void thin_product(Rows<T> a, int64_t rows, int64_t inner, const T* b, int64_t width, T* c,
                  bool add = false) {
  for (int64_t i = 0; i < rows; i += kRows) {
    const int64_t count = std::min<int64_t>(kRows, rows - i);
    for (int64_t j = 0; j < width; j += kPanel<T>) {
      const int64_t across = std::min(kPanel<T>, width - j);
      const Term<T> term{a.data + i * a.stride, a.stride, b + j, width, inner};
      block_fn<T>(count, across / kLanes<T>)(term, Term<T>{}, c + i * width + j, width, nullptr,
                                             add, Prefetch{});
    }
  }
}

// c [COLUMNS, VECTORS·lanes] += a^T·b over `depth` rows of a [depth, COLUMNS] and b. The rows of
// `a` are far apart, which the processor's own prefetcher does not follow.
template <class T, int COLUMNS, int VECTORS>
EFFT_INLINE void transposed_block(const T* a, int64_t lda, const T* b, int64_t ldb, int64_t depth,
                                  T* c, int64_t ldc) {
  Vec<T> acc[COLUMNS][VECTORS] = {};
  for (int64_t k = 0; k < depth; ++k) {
    __builtin_prefetch(a + kPrefetchRows * lda);
    __builtin_prefetch(a + kPrefetchRows * lda + COLUMNS - 1);
    step<T, COLUMNS, VECTORS>(acc, a, 1, b);
    a += lda;
    b += ldb;
  }
#pragma GCC unroll 32
  for (int i = 0; i < COLUMNS; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < VECTORS; ++j) {
      T* to = c + i * ldc + j * kLanes<T>;
      store(to, load(to) + acc[i][j]);
    }
  }
}

template <class T, int VECTORS>
void transposed_columns(const T* a, int64_t lda, const T* b, int64_t ldb, int64_t depth, T* c,
                        int64_t ldc, int64_t columns) {
  constexpr int kWide = kAccumulators / VECTORS;
  int64_t i = 0;
  for (; i + kWide <= columns; i += kWide) {
    transposed_block<T, kWide, VECTORS>(a + i, lda, b, ldb, depth, c + i * ldc, ldc);
  }
  for (; i + 4 <= columns; i += 4) {
    transposed_block<T, 4, VECTORS>(a + i, lda, b, ldb, depth, c + i * ldc, ldc);
  }
  for (; i < columns; ++i) {
    transposed_block<T, 1, VECTORS>(a + i, lda, b, ldb, depth, c + i * ldc, ldc);
  }
}

// Rows that a transposed product sums in one chain; a block of rows is one.
constexpr int64_t kTransposedChain = 256;

// c [columns, width] += a^T·b for a [depth, columns] and b [depth, width], width a multiple of the
// lanes.
template <class T>
void add_transposed_product(Rows<T> a, Rows<T> b, int64_t depth, T* c, int64_t ldc, int64_t columns,
                            int64_t width) {
  for (; depth > kTransposedChain; depth -= kTransposedChain) {
    add_transposed_product(a, b, kTransposedChain, c, ldc, columns, width);
    a.data += kTransposedChain * a.stride;
    b.data += kTransposedChain * b.stride;
  }
  for (int64_t j = 0; j < width; j += kVectors * kLanes<T>) {
    switch ((width - j) / kLanes<T>) {
      case 1:
        transposed_columns<T, 1>(a.data, a.stride, b.data + j, b.stride, depth, c + j, ldc,
                                 columns);
        break;
      case 2:
        transposed_columns<T, 2>(a.data, a.stride, b.data + j, b.stride, depth, c + j, ldc,
                                 columns);
        break;
      default:
        transposed_columns<T, kVectors>(a.data, a.stride, b.data + j, b.stride, depth, c + j, ldc,
                                        columns);
    }
  }
}

}  // namespace efft_kernels::cpu::EFFT_ISA
