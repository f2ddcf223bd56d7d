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

// c [ROWS, VECTORS·lanes] += a^T·b over `depth` rows of a [depth, ROWS] and of b. These rows are
// far apart, which the processor's own prefetcher does not follow.
template <class T, int ROWS, int VECTORS>
__attribute__((noinline)) void transposed_block(const T* a, int64_t lda, const T* b, int64_t ldb,
                                                int64_t depth, T* c, int64_t ldc) {
  Vec<T> acc[ROWS][VECTORS] = {};
  for (; depth > 0; --depth) {
#pragma GCC unroll 4
    for (int64_t byte = 0; byte < VECTORS * EFFT_VECTOR_BYTES; byte += kCacheLine) {
      __builtin_prefetch(reinterpret_cast<const char*>(b + kPrefetchRows * ldb) + byte, 0, 3);
    }
    step<T, ROWS, VECTORS>(acc, a, 1, b);
    a += lda;
    b += ldb;
  }
#pragma GCC unroll 32
  for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < VECTORS; ++j) {
      T* to = c + i * ldc + j * kLanes<T>;
      store(to, load(to) + acc[i][j]);
    }
  }
}

template <class T>
using TransposedFn = void (*)(const T*, int64_t, const T*, int64_t, int64_t, T*, int64_t);

template <class T, int VECTORS, int... I>
TransposedFn<T> transposed_of_rows(int64_t rows, std::integer_sequence<int, I...>) {
  static constexpr TransposedFn<T> table[] = {transposed_block<T, I + 1, VECTORS>...};
  return table[rows - 1];
}

// The block for 1 to kRows rows and 1 to kVectors vectors.
template <class T>
TransposedFn<T> transposed_fn(int64_t rows, int64_t vectors) {
  constexpr auto all = std::make_integer_sequence<int, kRows>{};
  switch (vectors) {
    case 1:
      return transposed_of_rows<T, 1>(rows, all);
    case 2:
      return transposed_of_rows<T, 2>(rows, all);
    default:
      return transposed_of_rows<T, kVectors>(rows, all);
  }
}

// Rows that a transposed product sums in one chain; a block of rows is one.
constexpr int64_t kTransposedChain = 256;

// c [rows, columns] += a^T·b for a [depth, rows] and b [depth, columns], c's rows having room for
// whole vectors. The many columns lie across the vectors and the few rows are broadcast: the other
// way around every multiplication would need a load of its own.
template <class T>
void add_transposed_product(Rows<T> a, int64_t rows, Rows<T> b, int64_t columns, int64_t depth,
                            T* c, int64_t ldc) {
  constexpr int64_t lanes = kLanes<T>;
  for (; depth > kTransposedChain; depth -= kTransposedChain) {
    add_transposed_product(a, rows, b, columns, kTransposedChain, c, ldc);
    a.data += kTransposedChain * a.stride;
    b.data += kTransposedChain * b.stride;
  }
  const auto add = [&](Rows<T> panel, int64_t vectors, T* to) {
    for (int64_t i = 0; i < rows; i += kRows) {
      transposed_fn<T>(std::min<int64_t>(kRows, rows - i), vectors)(
          a.data + i, a.stride, panel.data, panel.stride, depth, to + i * ldc, ldc);
    }
  };
  const int64_t whole = columns / lanes * lanes;
  for (int64_t j = 0; j < whole; j += kPanel<T>) {
    add({b.data + j, b.stride}, std::min(kPanel<T>, whole - j) / lanes, c + j);
  }
  if (whole == columns) return;
  // Less than a vector is left, beyond which a row of b ends.
  T edge[kTransposedChain * lanes] = {};
  for (int64_t k = 0; k < depth; ++k) {
    std::memcpy(edge + k * lanes, b.data + k * b.stride + whole, (columns - whole) * sizeof(T));
  }
  add({edge, lanes}, 1, c + whole);
}

}  // namespace efft_kernels::cpu::EFFT_ISA
