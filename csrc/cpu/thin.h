// Products whose result has a few columns: a·b and a^T·b for b of `width` columns.
#pragma once

#include "blocking.h"
#include "microkernel.h"

namespace efft_kernels::cpu::EFFT_ISA {

// a·b into c [rows, width] (added to it if `add`), for a [rows, steps] and b [steps, width] of E.
template <class E>
void thin_product(Rows<Scalar<E>> a, int64_t rows, int64_t steps, const E* b, int64_t width,
                  Sum<E>* c, bool add = false) {
  constexpr int64_t panel = kPanel<Sum<E>>;
  for (int64_t i = 0; i < rows; i += kRows) {
    const int64_t count = std::min<int64_t>(kRows, rows - i);
    for (int64_t j = 0; j < width; j += panel) {
      const int64_t across = std::min(panel, width - j);
      const Term<E> term{a.data + i * a.stride, a.stride, b + j, width, steps};
      block_fn<E>(count, across / kLanes<Sum<E>>)(term, Term<E>{}, c + i * width + j, width,
                                                  nullptr, add, Prefetch{});
    }
  }
}

// c [ROWS, VECTORS·lanes] += a^T·b over `depth` rows of a [depth, ROWS] and of b, both of E. These
// rows are far apart, which the processor's own prefetcher does not follow.
template <class E, int ROWS, int VECTORS>
__attribute__((noinline)) void transposed_block(const Scalar<E>* a, int64_t lda, const E* b,
                                                int64_t ldb, int64_t depth, Sum<E>* c,
                                                int64_t ldc) {
  Vec<Sum<E>> acc[ROWS][VECTORS] = {};
  for (; depth > 0; --depth) {
#pragma GCC unroll 4
    for (int64_t byte = 0; byte < VECTORS * EFFT_VECTOR_BYTES; byte += kCacheLine) {
      __builtin_prefetch(reinterpret_cast<const char*>(b + kPrefetchRows * ldb) + byte, 0, 3);
    }
    step<E, ROWS, VECTORS>(acc, a, Element<E>::kNumbers, b);
    a += lda;
    b += ldb;
  }
#pragma GCC unroll 32
  for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < VECTORS; ++j) {
      Sum<E>* to = c + i * ldc + j * kLanes<Sum<E>>;
      store(to, load(to) + acc[i][j]);
    }
  }
}

template <class E>
using TransposedFn = void (*)(const Scalar<E>*, int64_t, const E*, int64_t, int64_t, Sum<E>*,
                              int64_t);

template <class E, int VECTORS, int... I>
TransposedFn<E> transposed_of_rows(int64_t rows, std::integer_sequence<int, I...>) {
  static constexpr TransposedFn<E> table[] = {transposed_block<E, I + 1, VECTORS>...};
  return table[rows - 1];
}

// The block for 1 to kRows rows and 1 to kVectors vectors.
template <class E>
TransposedFn<E> transposed_fn(int64_t rows, int64_t vectors) {
  constexpr auto all = std::make_integer_sequence<int, kRows>{};
  switch (vectors) {
    case 1:
      return transposed_of_rows<E, 1>(rows, all);
    case 2:
      return transposed_of_rows<E, 2>(rows, all);
    default:
      return transposed_of_rows<E, kVectors>(rows, all);
  }
}

// Rows that a transposed product sums in one chain; a block of rows is one.
constexpr int64_t kTransposedChain = 256;

// c [rows, columns] += a^T·b for a [depth, rows] and b [depth, columns] of E, c's rows having room
// for whole vectors. The many columns lie across the vectors and the few rows are broadcast: the
// other way around every multiplication would need a load of its own.
template <class E>
void add_transposed_product(Rows<Scalar<E>> a, int64_t rows, Rows<E> b, int64_t columns,
                            int64_t depth, Sum<E>* c, int64_t ldc) {
  constexpr int64_t lanes = kLanes<Sum<E>>, panel = kPanel<Sum<E>>;
  for (; depth > kTransposedChain; depth -= kTransposedChain) {
    add_transposed_product<E>(a, rows, b, columns, kTransposedChain, c, ldc);
    a.data += kTransposedChain * a.stride;
    b.data += kTransposedChain * b.stride;
  }
  const auto add = [&](Rows<E> of, int64_t vectors, Sum<E>* to) {
    for (int64_t i = 0; i < rows; i += kRows) {
      transposed_fn<E>(std::min<int64_t>(kRows, rows - i), vectors)(
          a.data + i * Element<E>::kNumbers, a.stride, of.data, of.stride, depth, to + i * ldc,
          ldc);
    }
  };
  const int64_t whole = columns / lanes * lanes;
  for (int64_t j = 0; j < whole; j += panel) {
    add({b.data + j, b.stride}, std::min(panel, whole - j) / lanes, c + j);
  }
  if (whole == columns) return;
  // Less than a vector is left, beyond which a row of b ends.
  E edge[kTransposedChain * lanes] = {};
  for (int64_t k = 0; k < depth; ++k) {
    std::memcpy(edge + k * lanes, b.data + k * b.stride + whole, (columns - whole) * sizeof(E));
  }
  add({edge, lanes}, 1, c + whole);
}

}  // namespace efft_kernels::cpu::EFFT_ISA
